"""The drawing of a round's clients: so many at once, each by a coin of its own, or one after another in a fixed order.

No draw looks at data. Simulations draw from named streams; where a server keeps its cohorts secret, the operating system's
generator draws. An order is no secret: it is a permutation of all clients, made once from a seed.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fedveil.core.randomness import Stream

Draws = Literal["fixed", "poisson", "order"]


@dataclass(frozen=True)
class Chance:
    """The chance that a round's draws come from.

    stream: of the round; None for the operating system's generator
    order: the seed of the run's permutation
    """

    stream: Stream | None
    order: int = 0


@dataclass(frozen=True)
class Sampling:
    """How the cohorts of a run are drawn: `federation.sampling`, the population and the average cohort."""

    kind: Draws
    clients: int
    cohort: int

    def draw(self, nodes: Sequence[int], number: int, chance: Chance) -> list[int]:
        """Return the nodes that train in round `number`; nodes: those that are connected, k+1 for client k.

        poisson: each with the probability cohort / clients, independently of the others and of earlier rounds
        order: those of the round's places in the permutation. A client's turns are at least floor(clients / cohort)
        rounds apart, and in T rounds at most ceil(T cohort / clients); who is not connected misses its turn.
        """
        if self.kind == "order":
            turn = in_turn(self.clients, self.cohort, number, chance.order)
            there = nodes if isinstance(nodes, range) else set(nodes)
            return [client + 1 for client in turn if client + 1 in there]
        if self.kind == "poisson":
            return by_coins(nodes, self.cohort / self.clients, chance.stream, "sampling")
        return draw(nodes, self.cohort, chance.stream, "sampling")


def draw(nodes: Sequence[int], number: int, stream: Stream | None, purpose: str) -> list[int]:
    """Draw `number` of the nodes, every subset and order equally likely; draw all, in any order, where there are fewer.

    `random.sample` reads only the positions that it picks, so a range of a million clients is never written out.
    Flower's FedAvg draws the same nodes where Python's global generator is seeded from the same stream.
    stream: None draws from the operating system's generator
    """
    generator = secrets.SystemRandom() if stream is None else random.Random(stream.integer(purpose))
    return generator.sample(nodes, min(number, len(nodes)))


def by_coins(nodes: Sequence[int], rate: float, stream: Stream | None, purpose: str) -> list[int]:
    """Draw each of the nodes with the probability `rate`, independently (Poisson sampling).

    From a stream: how many, by the binomial distribution, and then which, so that the cost is that of the cohort.
    stream: None tosses a coin of the operating system's for each node; its 53 bits decide
    """
    if stream is None:
        coins = np.frombuffer(os.urandom(8 * len(nodes)), np.uint64) >> np.uint64(11)
        return [nodes[int(i)] for i in np.flatnonzero(coins * 2.0**-53 < rate)]
    number = int(stream.generator(f"{purpose} number").binomial(len(nodes), rate))
    return draw(nodes, number, stream, purpose)


def in_turn(clients: int, cohort: int, number: int, seed: int) -> list[int]:
    """Return the clients whose turn round `number` is: places (number - 1) cohort and on, around and around."""
    order = permutation(clients, seed)
    places = np.arange((number - 1) * cohort, number * cohort) % clients
    return [int(client) for client in order[places]]


@lru_cache(maxsize=1)
def permutation(clients: int, seed: int) -> np.ndarray:
    """Return the order in which all clients take part, int64 [clients]; a million take 20 ms, once."""
    return Stream(seed).generator("order").permutation(clients)
