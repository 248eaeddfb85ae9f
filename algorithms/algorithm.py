"""The interface of an algorithm: pure functions over named arrays, and state that can be stored.

On the server a round has two steps. The rule computes one aggregate from the cohort's updates. The server optimiser
computes the next model from that aggregate. An algorithm is a part (`fedveil.core.declaration`): a function
`(settings, experiment) -> Algorithm` of its own settings and the whole experiment's.
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
    """One client's contribution to a round; or a cohort's mean, as the contribution of one client with all examples.

    weights: float32 by name, after local training
    examples: n_k, the client's weight in a mean
    metrics: further numbers that the client reports, by name
    """

    client: int
    weights: Arrays
    examples: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """The input of an aggregation rule: one round's model and contributions.

    model: the weights that clients started from, float32 by name
    contributions: in the order of the clients' numbers
    learning_rate: of local training in this round
    size: the number of clients that a round asks for (`federation.cohort`); fewer may have contributed
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
        """The number of examples of each client."""
        return [one.examples for one in self.contributions]


def stateless(model: Arrays) -> State:
    """Return the state of an algorithm that keeps nothing between rounds."""
    return {}


def take_aggregate(state: State, model: Arrays, aggregate: Arrays) -> tuple[State, Arrays]:
    """Make the aggregate the next model, as an algorithm without a server optimiser does."""
    return state, aggregate


@dataclass(frozen=True)
class Algorithm:
    """The server's part of an algorithm.

    rule: cohort -> aggregate, by name
    init: initial model -> the server optimiser's state before the first round
    apply: (state, model, aggregate) -> (state, next model), by name; float32 or float64
    config: settings that the server sends to every client with the model
    reports: metrics that a client must report beside its update
    """

    rule: Callable[[Cohort], Arrays]
    init: Callable[[Arrays], State] = stateless
    apply: Callable[[State, Arrays, Arrays], tuple[State, Arrays]] = take_aggregate
    config: Mapping[str, float | bool] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
