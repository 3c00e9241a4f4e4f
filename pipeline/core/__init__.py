"""What everything stands on: files written atomically, configs composed by Hydra and checked, and the frame of a command.

In go overrides and YAML, out come checked settings or one `UserError`. It imports no other room.
"""
