"""A little federation without data: known weights that clients answer with, for strategies and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp

from fedveil import Experiment
from fedveil.algorithms.algorithm import Cohort, Contribution
from fedveil.core.examples import Task
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream
from fedveil.core.wire.messages import to_arrays
from fedveil.server import strategies
from fedveil.server.rounds.sampling import Chance
from fedveil.server.rounds.strategy import Strategy
from fedveil.simulations.engine.grid import InProcessGrid

SHAPES = {"dense.weight": (4, 3), "dense.bias": (4,)}
CLIENTS = 9
_RNG = np.random.default_rng(7)
GLOBAL = {name: _RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
LOCAL = [{name: _RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(CLIENTS)]
EXAMPLES = _RNG.integers(5, 50, CLIENTS)
LOSSES = _RNG.uniform(0.2, 2.0, CLIENTS)


def experiment(strategy: str, byzantine_clients: int = 0, **settings: Any) -> Experiment:
    """Settings for nine clients that all take part; `settings`: the strategy's own."""
    return Experiment(
        data={"clients": CLIENTS},
        training={"learning_rate": 0.5, "proximal_mu": 0.3},
        federation={
            "cohort": CLIENTS, "strategy": {"name": strategy, **settings}, "byzantine_clients": byzantine_clients,
        },
    )  # fmt: skip


def make(settings: Experiment) -> Strategy:
    """The strategy of an experiment whose clients tell classification's metrics."""
    return strategies.make(settings, MetricSet.of(Task("features", (4,), ("a", "b"))))


def play_round(
    strategy: Strategy, number: int, model: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One round in which client k answers LOCAL[k] + number - 1; the next model, float32, and the config that was sent."""
    grid = InProcessGrid(ClientApp(), CLIENTS, {})
    messages = strategy.train_messages(
        number, to_arrays(model), {"learning-rate": 0.5}, grid, Chance(Stream(0, number))
    )
    config = dict(messages[0].content["config"])
    contributions = []
    for k, _ in enumerate(messages):
        metrics = {"client": k, "num-examples": int(EXAMPLES[k]), "train-loss": 1.0, "global-loss": float(LOSSES[k])}
        local = {name: value + np.float32(number - 1) for name, value in LOCAL[k].items()}
        contributions.append(Contribution(k, local, int(EXAMPLES[k]), metrics))
    made = strategy.aggregate(number, Cohort(model, contributions, 0.5, CLIENTS))
    assert made is not None
    return {name: np.array(value, np.float32) for name, value in made.items()}, config
