"""One cell from its config to its result, and which cell is which.

`run` trains and evaluates one, `child` does so in a process, `grid` lists and runs an experiment's, `packing` trains several at once.
"""
