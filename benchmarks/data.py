"""The data sets of the jobs: random examples made in memory, as only the time counts.

Each client has its own, or a part of a pool in which clients overlap, where all of a large population would not fit.

They are loaded as a user's own data sets (`data.dataset = "benchmarks.data:random_images"`) and read the settings of
`[data]`. Each of the `data.clients` clients gets `data.dataset.examples` examples, a setting that they declare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.section import Count, Section
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet

IMAGE = (1, 28, 28)
DIGITS = tuple("0123456789")
TEST_EXAMPLES = 64  # few, as evaluation is not measured
POOL = 60_000  # examples that overlapping clients draw from, as many as MNIST has


class Random(Section):
    """The settings of both data sets."""

    examples: Count = Field(100, description="of each client")


@dataclass(frozen=True, eq=False)
class Pool:
    """A population whose clients hold `each` examples of a pool, drawn from the client's stream, and may overlap."""

    clients: int
    each: int
    pool: Examples

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return the pool, and the client's rows of it, int64 [each]."""
        return self.pool, Stream(0, client=client).generator("pool").integers(0, len(self.pool), self.each)

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return `each` for each of the clients: int64 [m]."""
        return np.full(len(clients), self.each)

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes]."""
        rows = [self.examples(int(k))[1] for k in clients]
        return np.array([np.bincount(self.pool.labels[own], minlength=classes) for own in rows])


def _images(rng: np.random.Generator, n: int) -> Examples:
    return Examples(rng.random((n, *IMAGE), dtype=np.float32), rng.integers(0, len(DIGITS), n))


def _messages(rng: np.random.Generator, n: int, data: Data) -> Examples:
    words = rng.integers(1, data.vocabulary_size, (n, data.max_tokens), dtype=np.int32)
    return Examples(words, rng.integers(0, 2, n))


@part(Random)
def random_images(data: Data) -> DataSet:
    """Make images of uniform noise in [0, 1), float32 [n, 1, 28, 28], with random labels of 10 classes."""
    rng = np.random.default_rng(0)
    train, test = _images(rng, _count(data)), _images(rng, TEST_EXAMPLES)
    return DataSet("random images", Task("images", IMAGE, DIGITS), train, test, made_up=True)


@part(Random)
def pooled_images(data: Data) -> DataSet:
    """Make such images for a pool in which clients overlap."""
    rng = np.random.default_rng(0)
    pool = Pool(data.clients, data.dataset.settings.examples, _images(rng, POOL))
    return DataSet("pooled images", Task("images", IMAGE, DIGITS), pool, _images(rng, TEST_EXAMPLES), made_up=True)


@part(Random)
def random_messages(data: Data) -> DataSet:
    """Make texts of `data.max_tokens` random words, none of them padding, with random labels of 2 classes."""
    rng = np.random.default_rng(0)
    train, test = _messages(rng, _count(data), data), _messages(rng, TEST_EXAMPLES, data)
    return DataSet("random messages", _texts(data), train, test, made_up=True)


@part(Random)
def pooled_messages(data: Data) -> DataSet:
    """Make such texts for a pool in which clients overlap."""
    rng = np.random.default_rng(0)
    pool = Pool(data.clients, data.dataset.settings.examples, _messages(rng, POOL, data))
    return DataSet("pooled messages", _texts(data), pool, _messages(rng, TEST_EXAMPLES, data), made_up=True)


def _texts(data: Data) -> Task:
    return Task("text", (data.max_tokens,), ("ham", "spam"), data.vocabulary_size)


def _count(data: Data) -> int:
    return int(data.clients * data.dataset.examples)
