"""The partition that sorts examples by label and gives each client a few shards of them."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.section import Count, Section
from fedveil.datasets.partition.division import Partition, Pool, even
from fedveil.datasets.partition.label_skew import shuffled_by_label


class Shards(Section):
    """Settings of `shards`."""

    shards: Count = Field(2, description="how many each client gets")


@part(Shards, tasks=("classification",))
def shards(pool: Pool, settings: Shards, rng: np.random.Generator) -> Partition:
    """Sort by label, cut into `clients * settings.shards` shards, and give each client `settings.shards` at random.

    McMahan, Moore, Ramage, Hampson and Aguera y Arcas 2017, section 3: "pathological non-IID". Sizes of shards differ
    by at most 1. Raise SettingsError where there are more shards than examples.
    """
    n, clients = len(pool), pool.clients
    number = clients * settings.shards
    if number > n:
        raise SettingsError(
            f"data.partition.shards = {settings.shards}: {clients:,} clients need {number:,} shards, and there are "
            f"{n:,} training examples; lower data.partition.shards or data.clients"
        )
    holder = rng.permutation(number) // settings.shards  # client of each shard
    owners = np.empty(n, np.int64)
    owners[shuffled_by_label(pool.labels, rng)] = np.repeat(holder, even(n, number))
    return Partition.of(owners, clients)
