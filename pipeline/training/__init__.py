"""The loop: one update after another, eager or on the fast engine, one run or several packed over one base.

In go a wrapped model, an objective and examples, out come the trained weights and what that took.
"""
