"""A task's rows: from its source by its recipe to prepared splits, and from those to batches of tokens.

In goes conf/task/<name>.yaml, out come data/<task>/ and, for a cell, `Rows`, `Example`s and padded `Batch`es.
"""
