"""Memory and time of a cell before it starts, from the model's configuration and the rows' tokens, without torch or a GPU."""
