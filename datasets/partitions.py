"""How the training examples are divided among the clients.

A partition is a function `(labels, clients, rng, data, groups, group_names) -> Partition`; a user's own is named
`package.module:function`. One that needs a label for each example declares it, `@part(tasks=("classification",))`: labels of
next_token are int64 [n, tokens]. None of them loops over clients: a million clients are divided in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.experiment import Data
from fedveil.core.parts import PARTITIONS
from fedveil.core.randomness import Stream
from fedveil.datasets.label_skew import balanced_owners, deal_to_owners, fill_mixes, shuffled_by_label


@dataclass(frozen=True, eq=False)
class Partition:
    """Which client holds which examples: client k those at `order[offsets[k]:offsets[k + 1]]`.

    order: int64 [n]; offsets: int64 [clients + 1]
    """

    order: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, clients: int) -> Partition:
        """The partition that gives example i to client `owners[i]` (int64 [n])."""
        sizes = np.bincount(owners, minlength=clients)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(np.argsort(owners, kind="stable").astype(np.int64, copy=False), offsets)

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.offsets) - 1

    def indices(self, client: int) -> np.ndarray:
        """The examples of a client: int64 [n_k]; raise SettingsError where there is no such client."""
        if not 0 <= client < self.clients:
            raise SettingsError(f"there is no client {client}: clients are 0 to {self.clients - 1}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def sizes(self) -> np.ndarray:
        """How many examples each client holds: int64 [clients]."""
        return np.diff(self.offsets)

    def first(self, most: int) -> Partition:
        """The same, with no more than `most` examples each."""
        sizes = np.minimum(self.sizes(), most)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = np.repeat(self.offsets[:-1] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Partition(self.order[rows], offsets)

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """How many examples of each class each client holds: int64 [clients, classes]. labels: int64 [n]."""
        client = np.repeat(np.arange(self.clients), self.sizes())
        flat = np.bincount(client * classes + labels[self.order], minlength=self.clients * classes)
        return flat.reshape(self.clients, classes)


Function = Callable[[np.ndarray, int, np.random.Generator, Data, np.ndarray | None, tuple[str, ...]], Partition]


def divide(
    labels: np.ndarray, groups: np.ndarray | None, group_names: tuple[str, ...], data: Data, seed: int
) -> Partition:
    """Divide the training examples among `data.clients` clients as `data.partition` says; the seed decides how.

    labels: int64 [n]; groups: int64 [n], an index into group_names, or None. Raise SettingsError, with the numbers that
    show why, where the examples do not suffice or the partition does not fit the data.
    """
    n, clients = len(labels), data.clients
    if clients > n:
        raise SettingsError(f"data.clients = {clients:,}: more clients than the {n:,} training examples")
    function: Function = PARTITIONS.load(data.partition, "data.partition")
    rng = Stream(seed).generator("partition")
    partition = function(labels, clients, rng, data, groups, group_names)
    _check(partition, n, data)
    return partition if data.client_examples is None else partition.first(data.client_examples)


def iid(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Shuffle the examples and deal them out; sizes differ by at most 1."""
    owners = np.empty(len(labels), np.int64)
    owners[rng.permutation(len(labels))] = np.arange(len(labels)) % clients
    return Partition.of(owners, clients)


@part(tasks=("classification",))
def shards(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Sort by label, cut into `clients * data.partition_shards` shards, and give each client that many at random.

    McMahan, Moore, Ramage, Hampson and Aguera y Arcas 2017, section 3: "pathological non-IID". Sizes of shards differ by
    at most 1. Raise SettingsError where there are more shards than examples.
    """
    n, number = len(labels), clients * data.partition_shards
    if number > n:
        raise SettingsError(
            f"data.partition_shards = {data.partition_shards}: {clients:,} clients need {number:,} shards, and there are "
            f"{n:,} training examples; lower data.partition_shards or data.clients"
        )
    holder = rng.permutation(number) // data.partition_shards  # client of each shard
    owners = np.empty(n, np.int64)
    owners[shuffled_by_label(labels, rng)] = np.repeat(holder, _even(n, number))
    return Partition.of(owners, clients)


@part(tasks=("classification",))
def dirichlet(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Draw each client's label mix `q_k ~ Dir(alpha * p)`, p the share of each class in all examples, and fill it.

    Hsu, Qi and Brown 2019 (arXiv 1909.06335), section 3. Sizes differ by at most 1; examples are drawn without
    replacement: a client whose class has run out goes on with its mix of the classes that are left.

    alpha (`data.partition_alpha`) is the whole concentration, as p sums to 1. Flower's DirichletPartitioner and NIID-Bench
    draw from Dir(a, ..., a) instead: their a is `alpha = a * classes` here where classes are balanced.
    """
    sizes = _even(len(labels), clients)
    wanted = fill_mixes(labels, sizes, data.partition_alpha, rng)
    places = np.repeat(np.arange(clients), sizes)[np.argsort(wanted, kind="stable")]  # clients, by the class they want
    owners = np.empty(len(labels), np.int64)
    owners[shuffled_by_label(labels, rng)] = places
    return Partition.of(owners, clients)


def quantity(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Mix labels alike, and give the client of rank r a size in proportion to `r ** -data.partition_exponent`.

    Every client first gets `data.min_examples`; what is left is divided by largest remainders; ranks are dealt at random.
    Raise SettingsError where there are not enough examples for the minimum.
    """
    n, least = len(labels), data.min_examples
    rest = n - clients * least
    if rest < 0:
        raise SettingsError(
            f"data.min_examples = {least}: {clients:,} clients need {clients * least:,} examples, and there are {n:,} to "
            "train on; lower data.min_examples or data.clients"
        )
    weights = np.arange(1, clients + 1, dtype=float) ** -data.partition_exponent
    shares = rest * (weights / weights.sum())
    sizes = np.floor(shares).astype(np.int64)
    largest = np.argsort(sizes - shares, kind="stable")
    sizes[largest[: rest - sizes.sum()]] += 1
    owners = np.empty(n, np.int64)
    owners[rng.permutation(n)] = np.repeat(rng.permutation(clients), sizes + least)
    return Partition.of(owners, clients)


@part(tasks=("classification",))
def classes(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Give each client exactly `data.partition_classes` classes at random, and deal each class evenly to its owners.

    Every class that occurs has an owner, and the numbers of owners differ by at most 1. Raise SettingsError, with the
    numbers, where a class would have no owner, or more owners than examples, or there are fewer classes than asked for.
    """
    each = data.partition_classes
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    known = f"data.partition_classes = {each}: the training examples have {len(present)} classes"
    if each > len(present):
        raise SettingsError(f"{known}, so no client can hold {each}")
    if clients * each < len(present):
        raise SettingsError(
            f"{known}, and {clients} client(s) with {each} each hold {clients * each} at most: some class would have no "
            "owner; raise data.partition_classes or data.clients"
        )
    owners, odd = divmod(clients * each, len(present))
    by_size = present[np.argsort(-sizes[present], kind="stable")]  # the largest classes get the odd owners
    owned = owners + (np.arange(len(present)) < odd)
    short = np.flatnonzero(owned > sizes[by_size])
    if len(short):
        least = by_size[short[-1]]
        raise SettingsError(
            f"{known}, and {clients:,} clients with {each} each make {owned[short[-1]]:,} owners of class {least}, which has "
            f"{sizes[least]:,} examples; lower data.partition_classes or data.clients"
        )
    held = by_size[balanced_owners(clients, each, len(present), rng)]  # [clients, each]
    return Partition.of(deal_to_owners(labels, held, rng), clients)


def natural(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Partition:
    """Keep each source (a mailbox, a user) whole: one to a client where the numbers agree, in the order of their names.

    With fewer clients than sources, the largest source goes first, each to the client that has least so far. Raise
    SettingsError where the data set knows no sources, or has fewer than clients.
    """
    if groups is None:
        raise SettingsError(
            f"data.partition = 'natural': data set '{data.dataset}' does not say where its examples come from; 'enron' "
            "does (2 mailboxes), and 'own' with data.group_column"
        )
    number = len(group_names)
    if clients > number:
        shown = ", ".join(group_names[:8]) + (", ..." if number > 8 else "")
        raise SettingsError(
            f"data.clients = {clients:,}: more clients than the {number:,} sources of the data: {shown}"
        )
    if clients == number:
        return Partition.of(groups, clients)
    sizes = np.bincount(groups, minlength=number)
    ties = rng.permutation(number)
    holder = np.empty(number, np.int64)
    loads = [(0, client) for client in range(clients)]
    for group in np.lexsort((ties, -sizes)).tolist():
        load, client = loads[0]
        holder[group] = client
        heapq.heapreplace(loads, (load + int(sizes[group]), client))
    return Partition.of(holder[groups], clients)


def hold_out(indices: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Divide a client's examples at random: indices to train on, and `round(n * fraction)` to evaluate on.

    int64 [n - m], int64 [m], each in the order given. Where fraction > 0 and n >= 2, both parts have at least 1;
    a client with one example trains on it.
    """
    n = len(indices)
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: held_out(np.array(n), fraction)]] = True
    return indices[~chosen], indices[chosen]


def held_out(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """How many examples clients with so many hold out, as `hold_out` says: int64, in the shape of `sizes` (int64)."""
    most = np.maximum(sizes - 1, 0)
    rounded = np.rint(sizes * fraction).astype(np.int64)
    return np.minimum(np.maximum(rounded, 1), most) if fraction > 0 else np.zeros_like(sizes)


def evenly(clients: int, most: int) -> np.ndarray:
    """Up to `most` clients, evenly taken from all: int64 [min(clients, most)], rising."""
    return np.linspace(0, clients - 1, min(clients, most)).astype(np.int64)


def _even(n: int, parts: int) -> np.ndarray:
    """Sizes of `parts` parts of n that differ by at most 1: int64 [parts]."""
    return n // parts + (np.arange(parts) < n % parts)


def _check(partition: Partition, n: int, data: Data) -> None:
    """Refuse a partition that loses or repeats examples, or leaves a client with fewer than the minimum."""
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
