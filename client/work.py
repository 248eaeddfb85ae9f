"""What a client does with a model it receives: train it, or evaluate it, on its own examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fedveil.core.examples import Task
from fedveil.core.experiment import Experiment
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import Federated, load
from fedveil.models.computing import find_device
from fedveil.models.evaluation import Scores, evaluate
from fedveil.models.networks import build
from fedveil.models.parameters import from_numpy
from fedveil.models.training import Trained, train_clients


@dataclass(frozen=True)
class Workplace:
    """What a client needs for all rounds of an experiment; made once a process, shared by its clients."""

    experiment: Experiment
    federated: Federated
    network: nn.Module
    device: torch.device


def workplace(settings: str) -> Workplace:
    """The workplace for an experiment, given as TOML text or a preset's name."""
    experiment = _experiment(settings)
    federated = load(experiment.data, experiment.seed)  # kept by `load`, which notices other data
    return Workplace(experiment, federated, *_network(settings, federated.dataset.task))


def forget() -> None:
    """Make the next workplace anew: another run in this process may mean another network by the same name."""
    _network.cache_clear()


@lru_cache(maxsize=2)
def _experiment(settings: str) -> Experiment:
    return Experiment.find(settings)


@lru_cache(maxsize=2)
def _network(settings: str, task: Task) -> tuple[nn.Module, torch.device]:
    experiment = _experiment(settings)
    device = find_device(experiment.device)
    return build(task, experiment.model, Stream(experiment.seed)).to(device), device


def train(
    place: Workplace,
    client: int,
    round_number: int,
    arrays: Mapping[str, np.ndarray],
    learning_rate: float,
    proximal_mu: float | None,
) -> Trained:
    """Train the received model on the client's training part; the result has K = 1."""
    examples, _ = place.federated.client(client)
    return train_clients(
        place.network,
        from_numpy(arrays, place.device),
        [examples],
        place.experiment.training,
        learning_rate,
        [Stream(place.experiment.seed, round_number, client)],
        classes=len(place.federated.dataset.task.classes),
        proximal_mu=proximal_mu,
    )


def score(place: Workplace, client: int, arrays: Mapping[str, np.ndarray], *, held_out: bool) -> Scores:
    """Evaluate the received model on the part the client holds out, or on the one it trains on."""
    training, validation = place.federated.client(client)
    examples = validation if held_out else training
    return evaluate(place.network, from_numpy(arrays, place.device), examples, place.experiment.training.loss)
