"""The layers that methods insert into a model: adapters, side networks, prompts, rows of answers.

Only methods import it.
"""
