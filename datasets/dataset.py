"""What a data set is: examples to train on, examples to test on, and the task they pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedveil.core.examples import Examples, Task

if TYPE_CHECKING:
    from fedveil.datasets.published.synthetic import Synthetic


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
    train: Examples | Synthetic
    test: Examples
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None
    made_up: bool = False
    columns: tuple[str, ...] = ()
