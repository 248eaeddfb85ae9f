"""Counter-based random keys, one at a time in Python's integers."""

from __future__ import annotations

from fedveil.core.randomness import Stream

_ALL = 2**64 - 1


def split_mix(seed: int, number: int) -> int:
    """The output at a position, from 0, of SplitMix64, which adds a constant to its state and mixes it."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _ALL
    return z ^ (z >> 31)


def slow_key(stream: Stream, purpose: str, counter: int) -> int:
    """What `keys` gives a stream at a counter."""
    return split_mix(split_mix(Stream(stream.seed, stream.round).integer(purpose), stream.client), counter)
