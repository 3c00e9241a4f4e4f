"""Statistics: numbers in, numbers out.

Tiers of techniques (seeds, paired rows, corrected tests), learning curves, spreads. It reads no file.
"""
