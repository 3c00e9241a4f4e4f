"""A race: techniques compared under a budget until one of them can be named with a stated error (`python -m pipeline.race`, docs/race.md).

Arms and their prices, screening on validation rows, the decision, the driver that runs cells and keeps the journal, the page.
"""
