"""alignscope: compares ways to align a language model with a task. README.md says how to run it."""

__version__ = "0.1.0"
