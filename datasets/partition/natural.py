"""The partition that gives all examples of one source to one client."""

from __future__ import annotations

import heapq

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.section import NoSettings
from fedveil.datasets.partition.division import Partition, Pool


@part()
def natural(pool: Pool, settings: NoSettings, rng: np.random.Generator) -> Partition:
    """Give each client all examples of its sources (mailboxes, users).

    With as many clients as sources, client k gets source k of `pool.group_names`. With fewer clients, sources are
    assigned from the largest down, each to the client with the fewest examples so far. Raise SettingsError where the
    data set has no sources, or fewer sources than clients.
    """
    groups, clients = pool.groups, pool.clients
    if groups is None:
        raise SettingsError(
            f"data.partition = 'natural': data set '{pool.dataset}' does not say where its examples come from; 'enron' "
            "does (2 mailboxes), and 'own' with data.group_column"
        )
    number = len(pool.group_names)
    if clients > number:
        shown = ", ".join(pool.group_names[:8]) + (", ..." if number > 8 else "")
        raise SettingsError(
            f"data.clients = {clients:,}: more clients than the {number:,} sources of the data: {shown}"
        )
    if clients == number:
        return Partition.of(groups, clients)
    sizes = np.bincount(groups, minlength=number)
    ties = rng.permutation(number)
    holder = np.empty(number, np.int64)
    loads = [(0, client) for client in range(clients)]
    for group in np.lexsort((ties, -sizes)).tolist():
        load, client = loads[0]
        holder[group] = client
        heapq.heapreplace(loads, (load + int(sizes[group]), client))
    return Partition.of(holder[groups], clients)
