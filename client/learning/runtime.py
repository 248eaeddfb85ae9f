"""The data, network and keys that clients of one process need for all rounds of an experiment."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.homomorphic import HomomorphicClient
from fedveil.client.learning.secagg import SecAggClients
from fedveil.client.learning.states import ClientStates
from fedveil.client.learning.witness import Witness
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.federated import Federated, load
from fedveil.datasets.hold_out import fewest_left
from fedveil.datasets.own.local import local, parse_source
from fedveil.models.computing import find_device, put
from fedveil.models.local.room import Room
from fedveil.models.networks.build import build, check_weights, example
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.functional import Functional
from fedveil.privacy.dp.accounting.guarantee import calibrated
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import find_client_key
from fedveil.privacy.plan import plan_for
from fedveil.privacy.trust.key_folders import check_agreed
from fedveil.privacy.trust.manifest import UNSIGNED

Adversary = Callable[[Contributions], None]
SECRET_BITS = 128  # of a seed that nobody can guess

log = logging.getLogger("flwr")  # where Flower shows what a node does


@dataclass(frozen=True)
class DataSource:
    """The data of a client on a machine of its own.

    source: the value of `--data`; client: its number; words: the vocabulary that the run brings, a line each
    """

    source: str
    client: int
    words: str

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Return the name, size and time of each file of the source, which tell whether the data changed."""
        path = parse_source(self.source).path
        if path is None:
            return ()
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@dataclass(frozen=True)
class ClientRuntime:
    """An experiment, its data and its network, ready for the clients of this process.

    keys: the folder of clients' keys, empty where there is none
    deployed: the client is on a machine of its own, with a server of another party
    secret_noise: noise that protects is the operating system's, else the seed's
    secret_training: so are the order, dropout and augmentation of training, so that no two answers are the same
    leak_guard: the least that the client's owner asks of `privacy.leak_guard`
    manifest: SHA-256 of the run's signed manifest; zeros where it has none
    states: of a simulation, the store of all clients' state; None where each node's context is the store
    witness: of a simulation, sees the clients' weights before they are protected
    adversary: of a simulation, sees and may change all contributions of a cohort between training and protection
    room: the memory that a GPU has for training clients at once
    """

    experiment: Experiment
    federated: Federated
    network: nn.Module
    device: torch.device
    keys: str = ""
    deployed: bool = False
    secret_noise: bool = False
    secret_training: bool = False
    leak_guard: str = "off"
    manifest: bytes = UNSIGNED
    states: ClientStates | None = None
    witness: Witness | None = None
    adversary: Adversary | None = None
    room: Room = field(default_factory=Room, compare=False)
    _homomorphic: dict[Path, HomomorphicClient] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def vectorized(self) -> Chain | Functional | None:
        """The network for training clients all at once; None where the experiment trains them one by one."""
        if self.experiment.engine != "batched":
            return None
        how = batched(self.network, example(self.federated.dataset.task).to(self.device))
        if isinstance(how, str):
            raise SettingsError(f"engine = 'batched': {how}; use engine = 'processes' or 'sequential'")
        return how

    @cached_property
    def metrics(self) -> MetricSet:
        """The metrics that clients report of an evaluation."""
        own = self.experiment.evaluation.metrics or ()
        return MetricSet.of(self.federated.dataset.task, own, f"data.dataset = '{self.experiment.data.dataset}'")

    @cached_property
    def layout(self) -> Layout:
        """The tensors of the network's weights."""
        return Layout(tuple((name, tuple(value.shape)) for name, value in self.network.named_parameters()))

    def homomorphic(self, client: int) -> HomomorphicClient | None:
        """Return the encryption and decryption of a client; None where the experiment encrypts no models.

        Raise ProtectionError where the client has no key.
        """
        privacy = self.experiment.privacy
        if privacy.shows != "sum":
            return None
        if not self.keys:
            raise ProtectionError(
                f"privacy.protection = '{privacy.protection}': the client needs client.key, and no folder of keys is named; name it in "
                "the node's configuration: keys = 'DIR'"
            )
        path = find_client_key(Path(self.keys), client)
        if path not in self._homomorphic:
            plan = plan_for(self.experiment)
            self._homomorphic[path] = HomomorphicClient(
                plan, self.experiment.data.clients, self.layout, path, self.manifest
            )
        return self._homomorphic[path]

    @cached_property
    def secagg(self) -> SecAggClients:
        """The clients of this process in secure aggregation."""
        return SecAggClients(self.experiment, self.layout, self.keys, self.manifest)

    def stream(self, number: int, client: int) -> Stream:
        """Return a client's random streams of a round: for training, and for a defence."""
        seed = secrets.randbits(SECRET_BITS) if self.secret_training else self.experiment.seed
        return Stream(seed, number, client)

    def check_agreed(self, client: int) -> None:
        """Raise ProtectionError where a client's keys were made for another `[privacy]` than the server's settings."""
        if self.keys:
            agreed = self.experiment.privacy.model_copy(update={"calibrated": None})  # which follows from the others
            check_agreed(agreed, Path(self.keys), client)

    def take_open_seconds(self, client: int) -> float:
        """Return the processor time of decryption in this process since the last call."""
        side = self.homomorphic(client)
        return 0.0 if side is None else side.take_open_seconds()


def client_runtime(
    settings: str,
    keys: str = "",
    own: DataSource | None = None,
    *,
    secret_noise: bool = False,
    secret_training: bool = False,
    leak_guard: str = "off",
    most_weights: int | None = None,
    manifest: bytes = UNSIGNED,
    states: ClientStates | None = None,
    witness: Witness | None = None,
    adversary: Adversary | None = None,
    room: Room | None = None,
) -> ClientRuntime:
    """Make the runtime of an experiment, given as TOML text or a preset's name.

    own: the data of a client on its own machine; without it, the client's share of the data that the settings name
    most_weights: a larger network is refused before it is built
    the others: as `ClientRuntime` has them
    Raise SettingsError or DataError where it cannot be made.
    """
    experiment = Experiment.received(settings)
    if own is None:
        federated = load(experiment.data, experiment.seed)
    else:
        words = own.words.split("\n") if own.words else None
        federated = local(experiment.data, experiment.seed, parse_source(own.source), own.client, words)
        columns = federated.dataset.columns
        notes = [*federated.dataset.files, *([f"the columns, in order: {', '.join(columns)}"] if columns else [])]
        if notes:  # for this client's operator, and nobody else
            log.warning("%s: %s", own.source, "; ".join(notes))
    if most_weights is not None:
        check_weights(federated.dataset.task, experiment.model, most_weights)
    device = find_device(experiment.device)
    network = put(build(federated.dataset.task, experiment.model, Stream(experiment.seed)), device)
    if own is not None or experiment.privacy.calibrated is None:
        experiment = _calibrated(experiment, sum(parameter.numel() for parameter in network.parameters()))
    return ClientRuntime(
        experiment,
        federated,
        network,
        device,
        keys,
        own is not None,
        secret_noise,
        secret_training,
        leak_guard,
        manifest,
        states,
        witness,
        adversary,
        room or Room(),
    )


def _calibrated(experiment: Experiment, numbers: int) -> Experiment:
    """Return an experiment with the noise that its budget asks for, as this client finds it; numbers: in a model.

    Raise ProtectionError where the settings say less: whoever sends them could leave the noise out.
    """
    said = experiment.privacy.calibrated
    least = fewest_left(experiment.data) if experiment.privacy.per_example else 0  # as the server counts them
    if said is None:
        return calibrated(experiment, numbers, least)
    unsaid = experiment.privacy.model_copy(update={"calibrated": None})
    found = calibrated(experiment.model_copy(update={"privacy": unsaid}), numbers, least).privacy.calibrated
    if found is not None and said < found:
        raise ProtectionError(
            f"privacy.calibrated = {said:g}: privacy.epsilon = {experiment.privacy.epsilon:g} asks for a noise multiplier of {found:g} "
            "at least; leave privacy.calibrated out"
        )
    return experiment
