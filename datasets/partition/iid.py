"""The partition that shuffles the examples and divides them evenly."""

from __future__ import annotations

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.settings.section import NoSettings
from fedveil.datasets.partition.division import Partition, Pool


@part()
def iid(pool: Pool, settings: NoSettings, rng: np.random.Generator) -> Partition:
    """Shuffle the examples and divide them evenly; sizes differ by at most 1."""
    owners = np.empty(len(pool), np.int64)
    owners[rng.permutation(len(pool))] = np.arange(len(pool)) % pool.clients
    return Partition.of(owners, pool.clients)
