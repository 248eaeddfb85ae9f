"""A data set divided among clients, which an experiment trains on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedveil.core.catalog import PARTITIONS
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task, check_task, fits
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet, Makers
from fedveil.datasets.hold_out import held_out, hold_out
from fedveil.datasets.partition.division import Partition, divide

BLOCK = 1 << 16  # clients whose sizes are computed at once
FEATURES = {"images": np.float32, "features": np.float32, "text": np.int32}

Version = tuple[str | int | None, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """A population whose examples are stored: the training part of a data set, and its partition."""

    train: Examples
    partition: Partition

    @property
    def clients(self) -> int:
        """Number of clients."""
        return self.partition.clients

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return all training examples, and the client's rows of them, int64 [n]."""
        return self.train, self.partition.indices(client)

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each of the clients (int64 [m]): int64 [m]."""
        found: np.ndarray = self.partition.offsets[clients + 1] - self.partition.offsets[clients]
        return found

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes]."""
        counts: np.ndarray = self.partition.counts(self.train.labels, classes)[clients]
        return counts


@dataclass(frozen=True, eq=False)
class Alone:
    """One client on its own machine, which holds that client's examples alone."""

    held: Examples
    client: int

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return the client's examples and all their row numbers, int64 [n]; `client` is not checked."""
        return self.held, np.arange(len(self.held))

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of the client's examples once for each of `clients`: int64 [m]."""
        return np.full(len(clients), len(self.held))

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of the client's examples of each class, once for each of `clients`: int64 [m, classes]."""
        return np.tile(np.bincount(self.held.labels, minlength=classes), (len(clients), 1))


@dataclass(frozen=True, eq=False)
class Federated:
    """A data set, and the examples of each client.

    holdings: stored examples and their partition, clients that generate their own, or one client on its own machine
    seed: of the experiment
    validation_fraction: the share of its examples that each client holds out to evaluate on
    """

    dataset: DataSet
    holdings: Stored | Makers | Alone
    seed: int
    validation_fraction: float

    @property
    def clients(self) -> range:
        """The clients whose examples are on this machine: all, or one."""
        if isinstance(self.holdings, Alone):
            return range(self.holdings.client, self.holdings.client + 1)
        return range(self.holdings.clients)

    def client(self, k: int) -> tuple[Examples, Examples]:
        """Return client k's training examples, and those that it holds out; the same at every call.

        Raise SettingsError where client k is not here.
        """
        self._check(np.array([k]))
        examples, rows = self.holdings.examples(k)
        if self.validation_fraction == 0:
            return examples.select(rows), examples.select(rows[:0])
        rng = Stream(self.seed, client=k).generator("validation")
        train, validation = hold_out(rows, self.validation_fraction, rng)
        return examples.select(train), examples.select(validation)

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of training examples of each of the clients (int64 [m]), `len(client(k)[0])`: int64 [m].

        No example is generated or copied. Raise SettingsError where a client is not here.
        """
        self._check(clients)
        held = self.holdings.sizes(clients)
        trained_on: np.ndarray = held - held_out(held, self.validation_fraction)
        return trained_on

    def counts(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes].

        Held-out examples count too. For a task without classes, it is the number of examples: int64 [m, 1].
        Raise SettingsError where a client is not here.
        """
        self._check(clients)
        classes = len(self.dataset.task.classes)
        return self.holdings.counts(clients, classes) if classes else self.holdings.sizes(clients)[:, None]

    def extremes(self) -> tuple[int, int]:
        """Return the fewest and the most examples that a client has, held-out ones included."""
        ends = [(int(block.min()), int(block.max())) for block in self._all_sizes()]
        return min(least for least, _ in ends), max(most for _, most in ends)

    def fewer_than(self, least: int) -> int:
        """Return the number of clients with fewer than `least` examples, held-out ones included."""
        return sum(int((block < least).sum()) for block in self._all_sizes())

    def _all_sizes(self) -> Iterator[np.ndarray]:
        """Yield the sizes of one block of clients after another, to save memory; a million clients take 20 ms."""
        everyone = self.clients
        for start in range(everyone.start, everyone.stop, BLOCK):
            yield self.holdings.sizes(np.arange(start, min(start + BLOCK, everyone.stop)))

    def _check(self, clients: np.ndarray) -> None:
        here = self.clients
        outside = clients[(clients < here.start) | (clients >= here.stop)]
        if not len(outside):
            return
        if isinstance(self.holdings, Alone):
            raise SettingsError(
                f"there is no client {outside[0]} here: this machine holds the data of client {here[0]}"
            )
        raise SettingsError(f"there is no client {outside[0]}: clients are 0 to {here[-1]}")


def load(data: Data, seed: int) -> Federated:
    """Load the data set and divide it among the clients.

    Loaded data sets are cached, so that another partition or number of clients reads no file again. Their arrays are
    shared: do not write into them. Raise DataError or SettingsError where the data cannot be loaded or divided.
    """
    return _divided(data, seed, _version(data))


@lru_cache(maxsize=4)
def _divided(data: Data, seed: int, version: Version) -> Federated:
    dataset = _dataset(data if data.dataset.is_own else _used(data), version)
    train = dataset.train
    if isinstance(train, Examples):
        tasks = data.partition.declaration.tasks
        named = f"data.partition = '{data.partition}'", f"data.dataset = '{data.dataset}'"
        check_task(named[0], tasks, dataset.task, named[1], PARTITIONS)
        partition = divide(train.labels, dataset.groups, dataset.group_names, data, seed)
        return Federated(dataset, Stored(train, partition), seed, data.validation_fraction)
    return Federated(dataset, train, seed, data.validation_fraction)


def _used(data: Data) -> Data:
    """Return the settings with defaults where the data set does not use them, as a key of the cache."""
    uses, fields = data.dataset.declaration.uses, Data.model_fields
    unused = [key for key in fields if key not in uses and key != "dataset"]
    return data.model_copy(update={key: fields[key].get_default(call_default_factory=True) for key in unused})


@lru_cache(maxsize=2)
def _dataset(data: Data, version: Version) -> DataSet:
    dataset = data.dataset.load()(data)
    _check(dataset, data.dataset.name, data.dataset.declaration.tasks)
    return dataset  # type: ignore[no-any-return]


def _version(data: Data) -> Version:
    """Return what loading depends on besides the settings: the data folders, and the state of the user's files."""
    files: list[Path] = []
    for name in (data.path, data.test_path, data.vocabulary):
        path = Path(name or "").expanduser()
        if name:
            files += [file for file in sorted(path.rglob("*")) or [path] if file.is_file()]
    states = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return (
        os.environ.get("FEDVEIL_DATA"),
        os.environ.get("FEDVEIL_CACHE"),
        *(part for state in states for part in state),
    )


def _check(dataset: object, name: str, tasks: tuple[str, ...]) -> None:
    """Raise DataError where the result of a loader, which may be a user's, does not fit `DataSet` and `Task`."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise DataError(f"data set '{name}': {message}")

    if not isinstance(dataset, DataSet):
        raise DataError(f"data set '{name}': its loader must return a DataSet, it gave a {type(dataset).__name__}")
    task = dataset.task
    refuse(not fits(tasks, task), f"its loader is declared for {' or '.join(tasks)}, and its task is {task}")
    of_tokens = task.predicts == "next_token"
    refuse(not of_tokens and len(task.classes) < 2, f"at least 2 classes are needed, it has {len(task.classes)}")
    refuse(of_tokens and (task.kind != "text" or bool(task.classes)), "next_token is of text, and has no classes")
    train = dataset.train
    if not isinstance(train, Examples):
        return  # clients generate the examples, and the test part too
    for part, examples in (("train", train), ("test", dataset.test)):
        features, labels = examples.features, examples.labels
        refuse(len(labels) == 0, f"{part} has no examples")
        refuse(len(features) != len(labels), f"{part} has {len(features):,} features and {len(labels):,} labels")
        refuse(
            features.shape[1:] != task.shape,
            f"{part} features have shape {features.shape}, its task says (n, *{task.shape})",
        )
        kind = FEATURES[task.kind]
        refuse(features.dtype != kind, f"{part} features are {features.dtype}, {task.kind} must be {np.dtype(kind)}")
        refuse(labels.dtype != np.int64, f"{part} labels are {labels.dtype}, they must be int64")
        _check_labels(examples, task, part, refuse)
        refuse(kind == np.float32 and not bool(np.isfinite(features).all()), f"{part} features have NaN or infinity")
        ids = task.vocabulary_size
        outside = task.kind == "text" and (int(features.min()) < 0 or int(features.max()) >= ids)
        refuse(outside, f"{part} word ids are not all in 0 to {ids - 1}")
    groups, names = dataset.groups, dataset.group_names
    if groups is not None:
        refuse(len(groups) != len(train), f"{len(groups):,} groups for {len(train):,} training examples")
        outside = groups.dtype != np.int64 or int(groups.min()) < 0 or int(groups.max()) >= len(names)
        refuse(outside, f"groups must be int64, an index into the {len(names):,} group_names")


def _check_labels(examples: Examples, task: Task, part: str, refuse: Callable[[bool, str], None]) -> None:
    """Refuse labels and masks that do not fit the task."""
    labels, mask = examples.labels, examples.mask
    shape = task.shape if task.predicts == "next_token" else ()
    refuse(
        labels.shape[1:] != shape,
        f"{part} labels have shape {labels.shape}, {task} has (n{''.join(f', {n}' for n in shape)})",
    )
    low, high, most = int(labels.min()), int(labels.max()), task.labels - 1
    of = "classes" if task.classes else "word ids"
    refuse(low < 0 or high > most, f"{part} labels are {low} to {high}, its {of} 0 to {most}")
    if task.predicts == "classification":
        refuse(mask is not None, f"{part} has a mask, which is for next_token; its task is {task}")
        return
    if mask is None:
        refuse(True, f"{part} has no mask, which says for {task} which positions count; give bool (n, tokens)")
        return
    refuse(
        mask.dtype != bool or mask.shape != labels.shape,
        f"{part} mask is {mask.dtype} {mask.shape}, it must be bool {labels.shape}",
    )
    empty = int((~mask.any(axis=1)).sum())
    refuse(empty > 0, f"{part} has {empty:,} examples in which no position counts; leave them out")
