"""The type of a data set: training examples, test examples, and the task that they pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedveil.core.examples import Examples, Task
from fedveil.datasets.scaling import Scaling


class Makers(Protocol):
    """A population of clients that generate their own examples, each from its stream."""

    @property
    def clients(self) -> int:
        """Number of clients."""

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return examples, and the client's rows of them, int64 [n]."""

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each of the clients (int64 [m]): int64 [m]."""

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes]."""


@dataclass(frozen=True)
class DataSet:
    """A data set as its loader returns it.

    train: examples to divide among the clients; or clients that generate their own
    groups: int64 [len(train)], the source of each training example (a mailbox, a user), an index into group_names; None
        where it is not known
    group_names: the sources' names
    words: the word of each id, for text with a known vocabulary; None where words are hashed or there are none
    made_up: whether the examples are made up, which is said wherever the data set is shown
    columns: names of a CSV file's features, in order; empty where they have none
    scaling: that its features went through; None for none
    notes: what may keep a network from learning from it, a line each
    files: what of the user's files was left out or changed, with counts
    """

    name: str
    task: Task
    train: Examples | Makers
    test: Examples
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None
    made_up: bool = False
    columns: tuple[str, ...] = ()
    scaling: Scaling | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
