"""The partition whose sizes follow a power law."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.section import NonNegative, Section
from fedveil.datasets.partition.division import Partition, Pool


class Quantity(Section):
    """Settings of `quantity`."""

    exponent: NonNegative = Field(1.0, description="size of the client of rank r ~ r^-exponent")


@part(Quantity)
def quantity(pool: Pool, settings: Quantity, rng: np.random.Generator) -> Partition:
    """Give the client of rank r a size in proportion to `r ** -settings.exponent`, and examples at random.

    Every client first gets `pool.least` (`data.min_examples`) examples; the rest is divided by largest remainders.
    Ranks are random. Raise SettingsError where there are not enough examples for the minimum.
    """
    n, clients, least = len(pool), pool.clients, pool.least
    rest = n - clients * least
    if rest < 0:
        raise SettingsError(
            f"data.min_examples = {least}: {clients:,} clients need {clients * least:,} examples, and there are {n:,} to "
            "train on; lower data.min_examples or data.clients"
        )
    weights = np.arange(1, clients + 1, dtype=float) ** -settings.exponent
    shares = rest * (weights / weights.sum())
    sizes = np.floor(shares).astype(np.int64)
    largest = np.argsort(sizes - shares, kind="stable")
    sizes[largest[: rest - sizes.sum()]] += 1
    owners = np.empty(n, np.int64)
    owners[rng.permutation(n)] = np.repeat(rng.permutation(clients), sizes + least)
    return Partition.of(owners, clients)
