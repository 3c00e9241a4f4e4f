"""Answers and what they are worth: log-likelihoods of choices, generated texts, metrics, and probes of what was forgotten.

In go a model and rows, out come predictions and a `Score`.
"""
