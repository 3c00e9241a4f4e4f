"""Sweeps and tuning: a space of settings, an Optuna study, trials on validation rows.

In goes a cell's config, out come trials and the best settings.
"""
