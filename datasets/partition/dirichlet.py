"""The partition that draws each client's label distribution from a Dirichlet distribution."""

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
    """Draw each client's label distribution q_k ~ Dir(alpha * p), p the share of each class, and examples from it.

    Hsu, Qi and Brown 2019 (arXiv 1909.06335), section 3. Sizes differ by at most 1. Examples are drawn without
    replacement: where a class has run out, a client goes on with its distribution over the classes that are left.

    `settings.alpha` is the total concentration, as p sums to 1. flwr-datasets' DirichletPartitioner and NIID-Bench divide
    each class among the clients instead, and so skew sizes too: that is `label_dirichlet`.
    """
    labels, clients = pool.labels, pool.clients
    sizes = even(len(pool), clients)
    wanted = fill_mixes(labels, sizes, settings.alpha, rng)
    places = np.repeat(np.arange(clients), sizes)[np.argsort(wanted, kind="stable")]  # clients, by the class they want
    owners = np.empty(len(labels), np.int64)
    owners[shuffled_by_label(labels, rng)] = places
    return Partition.of(owners, clients)
