"""Memory and time of a cell before it starts, from the model's configuration and the rows' tokens, without torch or a GPU.

In go a cell's config and a model's config.json, out come bytes and seconds with an interval, or `NoForecast` with the reason.
"""
