"""What a finished cell is on disk: its result, where it lies, tuned settings, and its mirror in MLflow.

`Result` is the schema; what was not measured is null. Reading a folder gives results or one `UserError`.
"""
