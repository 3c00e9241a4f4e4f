"""The only room that reads clocks, memory counters, energy counters and the machine's name.

In goes work to be measured, out come seconds, bytes and joules; a counter that a machine lacks gives None.
"""
