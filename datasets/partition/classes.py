"""The partition that gives each client exactly k classes."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.section import Count, Section
from fedveil.datasets.partition.division import Partition, Pool
from fedveil.datasets.partition.label_skew import balanced_owners, deal_to_owners


class Classes(Section):
    """Settings of `classes`."""

    classes: Count = Field(2, description="how many each client holds")


@part(Classes, tasks=("classification",))
def classes(pool: Pool, settings: Classes, rng: np.random.Generator) -> Partition:
    """Give each client `settings.classes` classes at random, and divide each class evenly among its owners.

    Every class has an owner, and the numbers of owners differ by at most 1. Raise SettingsError, with the numbers,
    where a class would have no owner, or more owners than examples, or there are fewer classes than asked for.
    """
    labels, clients, each = pool.labels, pool.clients, settings.classes
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    known = f"data.partition.classes = {each}: the training examples have {len(present)} classes"
    if each > len(present):
        raise SettingsError(f"{known}, so no client can hold {each}")
    if clients * each < len(present):
        raise SettingsError(
            f"{known}, and {clients} client(s) with {each} each hold {clients * each} at most: some class would have no "
            "owner; raise data.partition.classes or data.clients"
        )
    owners, odd = divmod(clients * each, len(present))
    by_size = present[np.argsort(-sizes[present], kind="stable")]  # the largest classes get the odd owners
    owned = owners + (np.arange(len(present)) < odd)
    short = np.flatnonzero(owned > sizes[by_size])
    if len(short):
        least = by_size[short[-1]]
        raise SettingsError(
            f"{known}, and {clients:,} clients with {each} each make {owned[short[-1]]:,} owners of class {least}, which has "
            f"{sizes[least]:,} examples; lower data.partition.classes or data.clients"
        )
    held = by_size[balanced_owners(clients, each, len(present), rng)]  # [clients, each]
    return Partition.of(deal_to_owners(labels, held, rng), clients)
