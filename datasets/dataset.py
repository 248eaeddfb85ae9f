"""What a data set is: examples to train on, examples to test on, and the task they pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedveil.core.examples import Examples, Task


class Makers(Protocol):
    """Clients that make their own examples, each from its stream."""

    @property
    def clients(self) -> int:
        """How many there are."""

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Examples, and which of them the client holds: int64 [n]."""

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """How many examples each of the clients (int64 [m]) holds: int64 [m]."""

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """How many examples of each class each of the clients holds: int64 [m, classes]."""


@dataclass(frozen=True)
class DataSet:
    """A data set as its loader returns it.

    train: examples to be divided among the clients; or clients that make their own
    groups: int64 [len(train)], the source of each training example (a mailbox, a user), where it is known
    group_names: the sources' names
    words: text with a known vocabulary: the word of each id; None where words are hashed or there are none
    columns: names of the features of a CSV, in order; empty where they have none
    made_up: True where the examples are not real; said wherever the data set is shown
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
