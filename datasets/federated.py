"""A data set divided among clients: what an experiment trains on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples
from fedveil.core.experiment import Data
from fedveil.core.parts import DATASETS
from fedveil.core.randomness import Stream
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.partitions import Partition, divide, hold_out

# Settings of `[data]` that the data sets of FedVeil do not depend on.
OF_THE_PARTITION = (
    "clients",
    "partition",
    "partition_alpha",
    "partition_classes",
    "partition_shards",
    "partition_exponent",
    "min_examples",
    "validation_fraction",
)
FEATURES = {"images": np.float32, "features": np.float32, "text": np.int32}

Version = tuple[str | int | None, ...]


@dataclass(frozen=True, eq=False)
class Federated:
    """A data set, and which client holds which of its training examples.

    validation_fraction: the share of its examples each client holds out to evaluate on
    """

    dataset: DataSet
    partition: Partition
    seed: int
    validation_fraction: float

    def client(self, k: int) -> tuple[Examples, Examples]:
        """What client k trains on, and what it holds out; the same whenever it is asked for.

        Raise SettingsError where there is no client k.
        """
        rng = Stream(self.seed, client=k).generator("validation")
        train, validation = hold_out(self.partition.indices(k), self.validation_fraction, rng)
        return self.dataset.train.take(train), self.dataset.train.take(validation)


def load(data: Data, seed: int) -> Federated:
    """Load the data set and divide it among the clients.

    What was loaded is kept, so that another partition or another number of clients reads no file again. The arrays are
    shared: do not write into them. Raise DataError or SettingsError where either cannot be had.
    """
    return _divided(data, seed, _version(data))


@lru_cache(maxsize=4)
def _divided(data: Data, seed: int, version: Version) -> Federated:
    defaults = {key: Data.model_fields[key].default for key in OF_THE_PARTITION}
    of_the_dataset = data if ":" in data.dataset else data.model_copy(update=defaults)  # a user's own may use them all
    dataset = _dataset(of_the_dataset, version)
    partition = divide(dataset.train.labels, dataset.groups, dataset.group_names, data, seed)
    return Federated(dataset, partition, seed, data.validation_fraction)


@lru_cache(maxsize=2)
def _dataset(data: Data, version: Version) -> DataSet:
    dataset = DATASETS.load(data.dataset, "data.dataset")(data)
    _check(dataset, data.dataset)
    return dataset  # type: ignore[no-any-return]


def _version(data: Data) -> Version:
    """What loading depends on beside the settings: where data is looked for, and the state of the user's files."""
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


def _check(dataset: object, name: str) -> None:
    """Raise DataError where a loader, a user's own perhaps, did not return a data set as `DataSet` and `Task` say."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise DataError(f"data set '{name}': {message}")

    if not isinstance(dataset, DataSet):
        raise DataError(f"data set '{name}': its loader must return a DataSet, it gave a {type(dataset).__name__}")
    task = dataset.task
    refuse(len(task.classes) < 2, f"at least 2 classes are needed, it has {len(task.classes)}")
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
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
        low, high, most = int(labels.min()), int(labels.max()), len(task.classes) - 1
        refuse(low < 0 or high > most, f"{part} labels are {low} to {high}, its classes 0 to {most}")
        refuse(kind == np.float32 and not bool(np.isfinite(features).all()), f"{part} features have NaN or infinity")
        ids = task.vocabulary_size
        outside = task.kind == "text" and (int(features.min()) < 0 or int(features.max()) >= ids)
        refuse(outside, f"{part} word ids are not all in 0 to {ids - 1}")
    groups, names = dataset.groups, dataset.group_names
    if groups is not None:
        refuse(
            len(groups) != len(dataset.train), f"{len(groups):,} groups for {len(dataset.train):,} training examples"
        )
        outside = groups.dtype != np.int64 or int(groups.min()) < 0 or int(groups.max()) >= len(names)
        refuse(outside, f"groups must be int64, an index into the {len(names):,} group_names")
