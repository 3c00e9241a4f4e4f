"""What is minimised, one file a family: each overrides the hooks of `base.Objective`.

In go rows and what a teacher wrote, out come examples and a loss. A config names a class by its `type` (core/names.py).
"""
