"""The drawing of a round's clients."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedveil.core.randomness import Stream


def draw(nodes: Sequence[int], number: int, stream: Stream, purpose: str) -> list[int]:
    """Draw `number` of the nodes, every subset and order equally likely; draw all, in any order, where there are fewer.

    `random.sample` reads only the positions that it picks, so a range of a million clients is never written out.
    Flower's FedAvg draws the same nodes where Python's global generator is seeded from the same stream.
    """
    generator = random.Random(stream.integer(purpose))
    return generator.sample(nodes, min(number, len(nodes)))
