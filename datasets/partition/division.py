"""The division of the training examples among the clients.

A partition is a function `(pool, settings, rng) -> Partition`, one file for each in this folder; a user's own is
`package.module:function`. Partitions do not loop over clients (but `natural` does), so a million clients take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Data


@dataclass(frozen=True, eq=False)
class Pool:
    """The training examples before they are divided.

    labels: int64 [n]
    clients: number of clients; least: the fewest examples that each must get (`data.min_examples`)
    groups: int64 [n], the source of each example, an index into group_names; None where sources are not known
    dataset: the data set's name
    """

    labels: np.ndarray
    clients: int
    least: int = 1
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    dataset: str = ""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Partition:
    """A division of examples among clients: client k holds the examples `order[offsets[k]:offsets[k + 1]]`.

    order: int64 [n]; offsets: int64 [clients + 1]
    """

    order: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, clients: int) -> Partition:
        """Return the partition that gives example i to client `owners[i]` (int64 [n])."""
        sizes = np.bincount(owners, minlength=clients)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(np.argsort(owners, kind="stable").astype(np.int64, copy=False), offsets)

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    def indices(self, client: int) -> np.ndarray:
        """Return the indices of a client's examples, int64 [n_k]; raise SettingsError where there is no such client."""
        if not 0 <= client < self.clients:
            raise SettingsError(f"there is no client {client}: clients are 0 to {self.clients - 1}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def sizes(self) -> np.ndarray:
        """Return the number of examples of each client, int64 [clients]."""
        return np.diff(self.offsets)

    def first(self, most: int) -> Partition:
        """Return the partition with no more than `most` examples for each client."""
        sizes = np.minimum(self.sizes(), most)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = np.repeat(self.offsets[:-1] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Partition(self.order[rows], offsets)

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of each client's examples of each class, int64 [clients, classes]; labels: int64 [n]."""
        client = np.repeat(np.arange(self.clients), self.sizes())
        flat = np.bincount(client * classes + labels[self.order], minlength=self.clients * classes)
        return flat.reshape(self.clients, classes)


def divide(
    labels: np.ndarray, groups: np.ndarray | None, group_names: tuple[str, ...], data: Data, seed: int
) -> Partition:
    """Divide the training examples among `data.clients` clients by `data.partition`, with random numbers from the seed.

    labels: int64 [n]; groups: int64 [n], an index into group_names, or None
    Raise SettingsError, with the numbers, where there are too few examples or the partition does not fit the data.
    """
    n, clients = len(labels), data.clients
    if clients > n:
        raise SettingsError(f"data.clients = {clients:,}: more clients than the {n:,} training examples")
    pool = Pool(labels, clients, data.min_examples, groups, group_names, data.dataset.name)
    choice = data.partition
    function = choice.load()
    try:
        partition = function(pool, choice.settings, Stream(seed).generator("partition"))
    except Exception as error:  # a user's code may raise anything
        if isinstance(error, FedveilError) or not choice.is_own:
            raise
        raise SettingsError(
            f"data.partition = '{choice.name}': failed ({type(error).__name__}: {error}); it is called as (pool, settings, "
            "rng) and returns a Partition"
        ) from error
    divided = _checked(partition, n, data)
    return divided if data.client_examples is None else divided.first(data.client_examples)


def even(n: int, parts: int) -> np.ndarray:
    """Return the sizes of `parts` parts of n, which differ by at most 1: int64 [parts]."""
    return n // parts + (np.arange(parts) < n % parts)


def _checked(partition: object, n: int, data: Data) -> Partition:
    """Return the partition; raise SettingsError where it loses or repeats examples, or a client has too few."""
    name, clients, least = data.partition, data.clients, data.min_examples
    if not isinstance(partition, Partition):
        raise SettingsError(f"data.partition = '{name}': must return a Partition, it gave a {type(partition).__name__}")
    order, offsets = partition.order, partition.offsets
    if partition.clients != clients or offsets[0] != 0 or offsets[-1] != len(order) or (np.diff(offsets) < 0).any():
        raise SettingsError(
            f"data.partition = '{name}': its offsets do not divide {n:,} examples among {clients:,} clients"
        )
    if len(order) != n or not np.array_equal(np.sort(order), np.arange(n)):
        raise SettingsError(f"data.partition = '{name}': it must give each of the {n:,} examples to exactly one client")
    sizes = partition.sizes()
    short = int((sizes < least).sum())
    if short:
        raise SettingsError(
            f"data.partition = '{name}': {short:,} of {clients:,} clients would hold fewer than data.min_examples = {least}; "
            f"the smallest has {sizes.min():,}, and there are {n:,} training examples; lower data.clients or data.min_examples"
        )
    return partition
