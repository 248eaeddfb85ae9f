"""Labelled examples and the task that they pose: what data sets return and networks take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fedveil.core.catalog import Table
from fedveil.core.declaration import declaration
from fedveil.core.errors import SettingsError


@dataclass(frozen=True)
class Examples:
    """Features and labels of n examples.

    features: images float32 [n, channels, height, width] in [0, 1]; tabular float32 [n, d];
        text int32 [n, tokens], padded at the end with 0 (`text.PADDING`)
    labels: int64 [n], indices into `Task.classes`; of next_token int64 [n, tokens], the word id after each position
    mask: of next_token bool [n, tokens], the positions that count; None where an example has one label
    """

    features: np.ndarray
    labels: np.ndarray
    mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predictions(self) -> int:
        """Number of predictions that are scored: one for each example, or one for each position in its mask."""
        return len(self) if self.mask is None else int(self.mask.sum())

    def take(self, indices: np.ndarray | slice) -> Examples:
        """Return the examples at `indices`, in that order; int64 [m] copies them, a slice does not."""
        mask = None if self.mask is None else self.mask[indices]
        return Examples(self.features[indices], self.labels[indices], mask)

    def select(self, indices: np.ndarray) -> Selection:
        """Return the examples at `indices`, int64 [m]; each array is copied when it is first read."""
        return Selection(self, indices)


class Selection(Examples):
    """Rows of other examples, copied when they are read, so that the clients of a population share one data set.

    source: the examples that the rows belong to
    rows: int64 [n], indices into `source`
    """

    source: Examples
    rows: np.ndarray

    def __init__(self, source: Examples, rows: np.ndarray) -> None:
        self.__dict__.update(source=source, rows=rows)  # Examples is frozen

    @cached_property
    def features(self) -> np.ndarray:
        """A copy of the rows."""
        copied: np.ndarray = self.source.features[self.rows]
        return copied

    @cached_property
    def labels(self) -> np.ndarray:
        """A copy of the rows."""
        copied: np.ndarray = self.source.labels[self.rows]
        return copied

    @cached_property
    def mask(self) -> np.ndarray | None:
        """A copy of the rows."""
        return None if self.source.mask is None else self.source.mask[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> Selection:
        """Return the rows at `indices`, int64 [m], as a selection of the same source."""
        return Selection(self.source, self.rows[indices])


def join(parts: Sequence[Examples]) -> Examples:
    """Concatenate the examples of all parts, in order."""
    masks = [part.mask for part in parts if part.mask is not None]
    return Examples(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate(masks) if masks else None,
    )


@dataclass(frozen=True)
class Task:
    """The learning task: the form of an example, and what is predicted from it.

    kind: the kind of example
    shape: of one example: (channels, height, width), (d,), or (tokens,)
    classes: names of the classes; where there are two, the second is the positive one (spam); none of next_token
    vocabulary_size: for text, the number of word ids, padding (0) and unknown (1) included; else 0
    predicts: `classification`, one of `classes` for each example; `next_token`, the word id that follows each position
    """

    kind: Literal["images", "features", "text"]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    vocabulary_size: int = 0
    predicts: Literal["classification", "next_token"] = "classification"

    @property
    def labels(self) -> int:
        """Number of labels, classes or word ids; a prediction has one logit for each."""
        return self.vocabulary_size if self.predicts == "next_token" else len(self.classes)

    @property
    def binary(self) -> bool:
        """Whether there are two classes, of which the second is the positive one."""
        return self.predicts == "classification" and len(self.classes) == 2

    @property
    def numbers(self) -> int:
        """Number of values in one example; for next_token, with the logits of all its positions."""
        logits = self.shape[0] * self.labels if self.predicts == "next_token" else 0
        return math.prod(self.shape) + logits

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a part may declare that it fits the task, from the most general to the most exact."""
        binary = ("binary classification",) if self.binary else ()
        return (self.predicts, *binary, str(self))

    def __str__(self) -> str:
        """Return the task in words: `classification of images`."""
        return f"{self.predicts} of {self.kind}"


def fits(tasks: Sequence[str], task: Task) -> bool:
    """Say whether a part that declares `tasks` fits `task`; a part that declares none fits any."""
    return not tasks or not set(tasks).isdisjoint(task.names)


def check_task(part: str, tasks: Sequence[str], task: Task, data: str = "the data", table: Table | None = None) -> None:
    """Raise SettingsError where a part that declares `tasks` does not fit `task`.

    part, data: the settings that name the part and the data set, as `model.name = 'lstm'`, for the message
    table: the parts of which the message names those that fit
    """
    if fits(tasks, task):
        return
    known = [name for name in table or () if table and fits(declaration(table.load(name, part)).tasks, task)]
    instead = f"; take {' or '.join(map(repr, known))}" if known else ""
    raise SettingsError(f"{part}: is for {' or '.join(tasks)}, and the task of {data} is {task}{instead}")
