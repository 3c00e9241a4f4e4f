"""A base model: fetched, loaded in a precision, and taken apart into its blocks.

In goes a folder under models/, out come a model and its tokenizer, or a block's linear layers and what goes through them.
"""
