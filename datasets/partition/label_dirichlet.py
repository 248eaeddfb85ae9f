"""The partition that divides each class among the clients by a Dirichlet distribution, so that sizes are skewed too."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.settings.section import Positive, Section
from fedveil.datasets.partition.division import Partition, Pool, even

TRIES = 11  # draws of the whole division, until every client has enough


class LabelDirichlet(Section):
    """Settings of `label_dirichlet`."""

    alpha: Positive = Field(0.5, description="concentration for each client; small is skewed, large is IID")
    self_balancing: bool = Field(
        True, description="whether a client that holds more than an even share gets nothing of further classes"
    )


@part(LabelDirichlet, tasks=("classification",))
def label_dirichlet(pool: Pool, settings: LabelDirichlet, rng: np.random.Generator) -> Partition:
    """Divide each class k among the clients in proportion to p_k ~ Dir(alpha, ..., alpha).

    Yurochkin et al. 2019 (arXiv 1905.12022), section 4, as flwr-datasets 0.6.1 has it (DirichletPartitioner): class after class;
    with `self_balancing`, a client that already holds more than n / clients examples gets none
    of a further class; the whole is drawn again, ten times at most, while a client has fewer than `pool.least` examples.
    """
    labels, clients = pool.labels, pool.clients
    owners = np.empty(len(labels), np.int64)
    for _ in range(TRIES):
        sizes = np.zeros(clients, np.int64)
        for k in np.unique(labels):
            rows = np.flatnonzero(labels == k)
            given = _parts(len(rows), sizes > len(labels) / clients, settings, rng)
            owners[rows] = np.repeat(np.arange(clients), given)
            sizes += given
        if sizes.min() >= pool.least:
            break
    return Partition.of(owners, clients)


def _parts(n: int, full: np.ndarray, settings: LabelDirichlet, rng: np.random.Generator) -> np.ndarray:
    """Draw how many of n examples of one class each client gets; full: bool [clients], who gets none if balanced."""
    shares = rng.dirichlet(np.full(len(full), settings.alpha))
    if settings.self_balancing:
        shares[full] = 0
    ends = np.cumsum(shares)
    if not 0 < ends[-1] < np.inf:  # so small an alpha that all of it went to full clients, or to none
        given = np.zeros(len(full), np.int64)
        given[~full] = even(n, int((~full).sum()))
        return given
    return np.diff((ends / ends[-1] * n).astype(np.int64), prepend=0)
