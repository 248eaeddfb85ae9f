"""A little federation without data: known weights that clients answer with, for strategies and checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fedveil import Experiment
from fedveil.core.messages import ARRAYS, METRICS, to_arrays
from fedveil.simulations.engine.grid import InProcessGrid

SHAPES = {"dense.weight": (4, 3), "dense.bias": (4,)}
CLIENTS = 9
_RNG = np.random.default_rng(7)
GLOBAL = {name: _RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
LOCAL = [{name: _RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(CLIENTS)]
EXAMPLES = _RNG.integers(5, 50, CLIENTS)
LOSSES = _RNG.uniform(0.2, 2.0, CLIENTS)


def experiment(strategy: str, **federation: Any) -> Experiment:
    """Settings for nine clients that all take part."""
    return Experiment(
        data={"clients": CLIENTS},
        training={"learning_rate": 0.5, "proximal_mu": 0.3},
        federation={"cohort": CLIENTS, "strategy": strategy, **federation},
    )


def play_round(strategy: Strategy, number: int, arrays: ArrayRecord) -> tuple[ArrayRecord, dict[str, Any]]:
    """One round in which client k answers LOCAL[k] + number - 1; the aggregate, and the config that was sent."""
    grid = InProcessGrid(ClientApp(), CLIENTS, {})
    messages = list(strategy.configure_train(number, arrays, ConfigRecord({"learning-rate": 0.5}), grid))
    config = dict(messages[0].content["config"])
    messages.sort(key=lambda m: m.metadata.dst_node_id)
    replies = []
    for k, message in enumerate(messages):
        metrics = {"client": k, "num-examples": int(EXAMPLES[k]), "train-loss": 1.0, "global-loss": float(LOSSES[k])}
        local = to_arrays({name: value + np.float32(number - 1) for name, value in LOCAL[k].items()})
        replies.append(Message(RecordDict({ARRAYS: local, METRICS: MetricRecord(metrics)}), reply_to=message))
    aggregate, _ = strategy.aggregate_train(number, replies)
    assert aggregate is not None
    return aggregate, config
