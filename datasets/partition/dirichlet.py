"""Each client's label mix drawn from a Dirichlet distribution."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.settings.section import Positive, Section
from fedveil.datasets.partition.division import Partition, Pool, even
from fedveil.datasets.partition.label_skew import fill_mixes, shuffled_by_label


class Dirichlet(Section):
    """Settings of `dirichlet`."""

    alpha: Positive = Field(0.5, description="concentration; small is skewed, large is IID")


@part(Dirichlet, tasks=("classification",))
def dirichlet(pool: Pool, settings: Dirichlet, rng: np.random.Generator) -> Partition:
    """Draw each client's label mix `q_k ~ Dir(alpha * p)`, p the share of each class in all examples, and fill it.

    Hsu, Qi and Brown 2019 (arXiv 1909.06335), section 3. Sizes differ by at most 1; examples are drawn without
    replacement: a client whose class has run out goes on with its mix of the classes that are left.

    `settings.alpha` is the whole concentration, as p sums to 1. Flower's DirichletPartitioner and NIID-Bench
    draw from Dir(a, ..., a) instead: their a is `alpha = a * classes` here where classes are balanced.
    """
    labels, clients = pool.labels, pool.clients
    sizes = even(len(pool), clients)
    wanted = fill_mixes(labels, sizes, settings.alpha, rng)
    places = np.repeat(np.arange(clients), sizes)[np.argsort(wanted, kind="stable")]  # clients, by the class they want
    owners = np.empty(len(labels), np.int64)
    owners[shuffled_by_label(labels, rng)] = places
    return Partition.of(owners, clients)
