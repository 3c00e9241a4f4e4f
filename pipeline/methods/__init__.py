"""What of a model is trained, one file a family: each overrides the hooks of `base.Method`.

A config names a class by its `type` (core/names.py); no other file does. What a method inserts into a model is in modules/.
"""
