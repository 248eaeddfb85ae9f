"""The data sets of the jobs: random examples made in memory, as only the time counts.

They are loaded as a user's own data sets (`data.dataset = "benchmarks.data:random_images"`) and read the settings of
`[data]`. Each of the `data.clients` clients gets `data.dataset.examples` examples, a setting that they declare.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.examples import Examples, Task
from fedveil.core.settings.section import Count, Section
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet

IMAGE = (1, 28, 28)
DIGITS = tuple("0123456789")
TEST_EXAMPLES = 64  # few, as evaluation is not measured


class Random(Section):
    """The settings of both data sets."""

    examples: Count = Field(100, description="of each client")


@part(Random)
def random_images(data: Data) -> DataSet:
    """Make images of uniform noise in [0, 1), float32 [n, 1, 28, 28], with random labels of 10 classes."""
    rng = np.random.default_rng(0)

    def part(n: int) -> Examples:
        return Examples(rng.random((n, *IMAGE), dtype=np.float32), rng.integers(0, len(DIGITS), n))

    return _dataset("random images", Task("images", IMAGE, DIGITS), part(_count(data)), part(TEST_EXAMPLES))


@part(Random)
def random_messages(data: Data) -> DataSet:
    """Make texts of `data.max_tokens` random words, none of them padding, with random labels of 2 classes."""
    rng = np.random.default_rng(0)

    def part(n: int) -> Examples:
        words = rng.integers(1, data.vocabulary_size, (n, data.max_tokens), dtype=np.int32)
        return Examples(words, rng.integers(0, 2, n))

    task = Task("text", (data.max_tokens,), ("ham", "spam"), data.vocabulary_size)
    return _dataset("random messages", task, part(_count(data)), part(TEST_EXAMPLES))


def _count(data: Data) -> int:
    return int(data.clients * data.dataset.examples)


def _dataset(name: str, task: Task, train: Examples, test: Examples) -> DataSet:
    return DataSet(name, task, train, test, made_up=True)
