"""Who takes part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedveil.core.randomness import Stream


def draw(nodes: Sequence[int], number: int, stream: Stream, purpose: str) -> list[int]:
    """Return `number` of the nodes, each set and order of them as likely; all of them, in any order, where there are fewer.

    `random.sample` reads the places that it picks and no others, so a range of a million clients is never written down. The
    nodes are those that Flower's FedAvg draws where Python's global generator is set from the same stream.
    """
    generator = random.Random(stream.integer(purpose))
    return generator.sample(nodes, min(number, len(nodes)))
