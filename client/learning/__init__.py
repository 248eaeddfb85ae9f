"""A client's work in a round: a list of steps over K contributions, which every engine executes.

receive -> measure, train -> [a simulation's adversaries] -> transform -> encrypt, mask, or guard and encode -> reply
A client on a machine of its own is K = 1; an engine chooses K, and where each step runs (`pipeline.py`).
"""
