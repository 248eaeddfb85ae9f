"""What an algorithm is: pure functions over named arrays, and state that can be stored.

On the server a round has two steps. The rule makes one aggregate of the cohort's updates; the server optimiser makes the next
model of that aggregate. An algorithm is a part (`fedveil.core.declaration`): a function from its settings to an `Algorithm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
State = Mapping[str, Any]  # numbers, arrays, and arrays by name


@dataclass(frozen=True)
class Contribution:
    """One client's part in a round; or the mean of a cohort, as the contribution of one client with all the examples.

    weights: float32 by name, after local training
    examples: n_k, the client's weight in a mean
    metrics: further numbers that the client tells, by name
    """

    client: int
    weights: Arrays
    examples: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """A round as its aggregation sees it.

    model: the weights that clients started from, float32 by name
    contributions: in the order of the clients' numbers
    learning_rate: of the clients in this round
    size: the clients that a round asks for (`federation.cohort`), of which some may be missing
    """

    model: Arrays
    contributions: Sequence[Contribution]
    learning_rate: float
    size: int

    @property
    def weights(self) -> list[Arrays]:
        """The weights of each client."""
        return [one.weights for one in self.contributions]

    @property
    def examples(self) -> list[float]:
        """The examples of each client."""
        return [one.examples for one in self.contributions]


def stateless(model: Arrays) -> State:
    """Return the state of an algorithm that keeps nothing between rounds."""
    return {}


def take_aggregate(state: State, model: Arrays, aggregate: Arrays) -> tuple[State, Arrays]:
    """Make the aggregate the next model, as an algorithm without a server optimiser does."""
    return state, aggregate


@dataclass(frozen=True)
class Algorithm:
    """The server's half of an algorithm.

    rule: the aggregate of a cohort, by name
    init: the server optimiser's state before the first round, of the first model
    apply: (state, model, aggregate) -> (state, next model), by name; float32 or float64
    config: what every client is told with the model
    reports: metrics that a client must tell beside its update
    """

    rule: Callable[[Cohort], Arrays]
    init: Callable[[Arrays], State] = stateless
    apply: Callable[[State, Arrays, Arrays], tuple[State, Arrays]] = take_aggregate
    config: Mapping[str, float | bool] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
