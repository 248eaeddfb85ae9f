"""The data set of an audit: the experiment's own clients, and beside them the canaries, one example each.

Canaries train like everybody, and their updates are replaced afterwards; so it matters little which example each holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.examples import Examples
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Section
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet, Makers
from fedveil.datasets.federated import Federated, load

CROWD = f"{__name__}:crowd"


class Crowd(Section):
    """Settings of `crowd`."""

    experiment: Annotated[str, Field(max_length=10**6)] = Field(
        description="the experiment, as TOML, whose data the first clients hold"
    )


@part(Crowd, uses=("clients",))
def crowd(data: Data) -> DataSet:
    """Load the data of the audited experiment, held by its own clients and by as many canaries as `data.clients` says."""
    experiment = Experiment.parse(data.dataset.settings.experiment)
    federated = load(experiment.data, experiment.seed)
    return relabelled(federated.dataset, WithCanaries(federated, data.clients))


def relabelled(dataset: DataSet, train: Makers) -> DataSet:
    """Return a data set whose clients are those of `train`, with all else as it is."""
    return replace(dataset, train=train, groups=None, group_names=())


@dataclass(frozen=True, eq=False)
class WithCanaries:
    """A population of `clients`: those of `federated`, then canaries, each with the first example of one of those."""

    federated: Federated
    clients: int

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return the client's examples and all their row numbers, int64 [n]."""
        own = len(self.federated.clients)
        held = self.federated.client(client % own)[0]
        return held, np.arange(len(held) if client < own else 1)

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each of the clients (int64 [m]): int64 [m]."""
        own = len(self.federated.clients)
        found = np.ones(len(clients), np.int64)
        found[clients < own] = self.federated.sizes(clients[clients < own])
        return found

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes]."""
        return np.array([
            np.bincount(held.labels[rows], minlength=classes) for held, rows in map(self.examples, clients)
        ])  # fmt: skip
