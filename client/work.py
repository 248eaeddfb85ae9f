"""What a client does with a model it receives: train it, or evaluate it, on its own examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.client.masked import MaskedSide, masked_side
from fedveil.client.protect import LatticeSide, Witness, lattice_side
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.examples import Task
from fedveil.core.experiment import Experiment
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import Federated, load
from fedveil.datasets.local import local, parse_source
from fedveil.models.batched import Chain, batched
from fedveil.models.build import build, example
from fedveil.models.computing import find_device
from fedveil.models.evaluation import Scores, evaluate
from fedveil.models.functional import Functional
from fedveil.models.parameters import from_numpy
from fedveil.models.training import Trained, train_clients
from fedveil.privacy.keys import find_client_key
from fedveil.privacy.packing import Layout
from fedveil.privacy.parties import check_agreed


@dataclass(frozen=True)
class Own:
    """Where the data of a client on its own machine is, as `--data` says; and the vocabulary that the run brings, a line each."""

    source: str
    client: int
    words: str


@dataclass(frozen=True)
class Workplace:
    """What a client needs for all rounds of an experiment; made once a process, shared by its clients."""

    experiment: Experiment
    federated: Federated
    network: nn.Module
    device: torch.device
    keys: str = ""

    @cached_property
    def together(self) -> Chain | Functional | None:
        """How clients are computed all at once, where the experiment says so."""
        if self.experiment.engine != "batched":
            return None
        how = batched(self.network, example(self.federated.dataset.task).to(self.device))
        if isinstance(how, str):
            raise SettingsError(f"engine = 'batched': {how}; use engine = 'processes' or 'sequential'")
        return how

    @property
    def layout(self) -> Layout:
        """The tensors of the network's weights."""
        return Layout(tuple((name, tuple(value.shape)) for name, value in self.network.named_parameters()))

    def lattice(self, client: int) -> LatticeSide | None:
        """How a client encrypts and decrypts; None where the experiment's models are no ciphertexts."""
        if self.experiment.privacy.shows != "sum":
            return None
        if not self.keys:
            raise ProtectionError(
                f"privacy.protection = '{self.experiment.privacy.protection}': the client needs client.key, and no folder of keys "
                "is named; name it in the node's configuration: keys = 'DIR'"
            )
        return lattice_side(self.experiment, self.layout, find_client_key(Path(self.keys), client))

    def check_agreed(self, client: int) -> None:
        """Raise ProtectionError where a client's keys were made for another `[privacy]` than the run's, which the server names."""
        if self.keys:
            check_agreed(self.experiment.privacy, Path(self.keys), client)

    def take_open_seconds(self, client: int) -> float:
        """Processor time of decryption in this process since this was last asked."""
        side = self.lattice(client)
        return 0.0 if side is None else side.take_open_seconds()

    @property
    def masked(self) -> MaskedSide:
        """How clients of this process mask their updates."""
        return masked_side(self.experiment, self.layout)


def workplace(settings: str, keys: str = "", own: Own | None = None) -> Workplace:
    """The workplace for an experiment, given as TOML text or a preset's name.

    keys: the folder with clients' keys; own: the data of a client on its own machine, None for a share of what the settings name
    """
    experiment = _experiment(settings)
    # both are kept, and notice other data
    federated = _local(settings, own, _state(own.source)) if own else load(experiment.data, experiment.seed)
    return Workplace(experiment, federated, *_network(settings, federated.dataset.task), keys)


def forget() -> None:
    """Make the next workplace anew: another run in this process may mean another network by the same name."""
    _network.cache_clear()
    _local.cache_clear()
    lattice_side.cache_clear()
    masked_side.cache_clear()


@contextmanager
def witnessed(place: Workplace, witness: Witness | None) -> Iterator[None]:
    """While a simulation computes clients one by one in this process, let `witness` see what they make."""
    protection = place.experiment.privacy.protection.name
    if witness is None or protection == "none":
        yield
        return
    watchers = place.masked.witnesses if protection == "secagg" else place.lattice(0).witnesses  # type: ignore[union-attr]
    watchers.append(witness)
    try:
        yield
    finally:
        watchers.remove(witness)


def _state(source: str) -> tuple[tuple[str, int, int], ...]:
    """What a client's own data depends on beside its name: the state of its files."""
    path = parse_source(source).path
    if path is None:
        return ()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=1)
def _local(settings: str, own: Own, _state: tuple[tuple[str, int, int], ...]) -> Federated:
    experiment = _experiment(settings)
    words = own.words.split("\n") if own.words else None
    return local(experiment.data, experiment.seed, parse_source(own.source), own.client, words)


@lru_cache(maxsize=2)
def _experiment(settings: str) -> Experiment:
    return Experiment.received(settings)


@lru_cache(maxsize=2)
def _network(settings: str, task: Task) -> tuple[nn.Module, torch.device]:
    experiment = _experiment(settings)
    device = find_device(experiment.device)
    return build(task, experiment.model, Stream(experiment.seed)).to(device), device


def train(
    place: Workplace,
    clients: Sequence[int],
    round_number: int,
    arrays: Mapping[str, np.ndarray],
    learning_rate: float,
    proximal_mu: float | None,
    into: dict[str, Tensor] | None = None,
) -> Trained:
    """Train the received model on each client's training part, as `train_clients` does."""
    return train_clients(
        place.network,
        from_numpy(arrays, place.device),
        [place.federated.client(client)[0] for client in clients],
        place.experiment.training,
        learning_rate,
        [Stream(place.experiment.seed, round_number, client) for client in clients],
        classes=len(place.federated.dataset.task.classes),
        proximal_mu=proximal_mu,
        together=place.together,
        into=into,
    )


def score(place: Workplace, client: int, arrays: Mapping[str, np.ndarray], *, held_out: bool) -> Scores:
    """Evaluate the received model on the part the client holds out, or on the one it trains on."""
    training, validation = place.federated.client(client)
    examples = validation if held_out else training
    return evaluate(place.network, from_numpy(arrays, place.device), examples, place.experiment.training.loss)
