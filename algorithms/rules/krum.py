"""Krum and Multi-Krum: Blanchard et al. 2017, "Machine Learning with Adversaries", sections 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort
from fedveil.algorithms.fedavg import weighted_mean
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Count, Section

WHY = "Krum compares updates"


class Krum(Section):
    """Settings of Krum."""

    byzantine_clients: Annotated[int, Field(ge=0)] = Field(0, description="f: how many clients of a cohort may lie")


class MultiKrum(Krum):
    """Settings of Multi-Krum."""

    selected: Count | None = Field(
        None, description="m: updates to average; cohort - byzantine_clients - 2 without it, the most there can be"
    )


def by_score(weights: Sequence[Arrays], byzantine: int) -> list[int]:
    """Return the clients' positions from the least score to the largest; a score sums the squared distances to n - f - 2 others.

    byzantine: f. Distances are |x|^2 + |y|^2 - 2 xy in float32, as in Flower, and so may order near neighbours in another way
    than exact ones; a client's own is taken to be the first in its row.
    """
    flat = np.stack([np.concatenate(list(own.values()), axis=None) for own in weights])  # [n, P]
    norms = np.square(flat).sum(axis=1)
    distances = norms[:, None] + norms[None, :] - 2 * flat @ flat.T  # [n, n]
    others = max(1, len(weights) - byzantine - 2)
    scores = [np.sum(row[np.argsort(row)[1 : others + 1]]) for row in distances]
    return [int(position) for position in np.argsort(scores)]


def multikrum_mean(cohort: Cohort, byzantine: int, selected: int) -> Arrays:
    """Return the mean of the `selected` updates of least score, by examples, summed in the order of their scores."""
    chosen = [cohort.contributions[i] for i in by_score(cohort.weights, byzantine)[:selected]]
    return weighted_mean([one.weights for one in chosen], [one.examples for one in chosen])


def check(settings: Krum, experiment: Experiment) -> None:
    """Raise SettingsError where the cohort is smaller than 2 f + 3, or more updates are selected than n - f - 2."""
    name, liars = experiment.federation.strategy, settings.byzantine_clients
    require_cohort(experiment, liars, 2 * liars + 3)
    most = experiment.federation.cohort - liars - 2
    if isinstance(settings, MultiKrum) and (settings.selected or 1) > most:
        raise SettingsError(
            f"federation.selected = {settings.selected}: {name} can select at most cohort - byzantine_clients - 2 = {most} "
            "updates"
        )


def require_cohort(experiment: Experiment, liars: int, least: int) -> None:
    """Raise SettingsError where a cohort is smaller than `least`, which a rule needs against so many liars."""
    settings = experiment.federation
    if settings.cohort < least:
        raise SettingsError(
            f"federation.cohort = {settings.cohort}: {settings.strategy} with federation.byzantine_clients = {liars} needs at "
            f"least {least}"
        )


@part(Krum, needs="each", why=WHY, check=check)
def krum(settings: Krum) -> Algorithm:
    """Krum: the one update closest to its neighbours."""
    return Algorithm(rule=lambda cohort: multikrum_mean(cohort, settings.byzantine_clients, 1))


@part(MultiKrum, needs="each", why=WHY, check=check)
def multikrum(settings: MultiKrum) -> Algorithm:
    """Multi-Krum: the mean of the updates closest to their neighbours, by examples, where the paper weighs them alike."""
    liars = settings.byzantine_clients
    return Algorithm(rule=lambda cohort: multikrum_mean(cohort, liars, settings.selected or cohort.size - liars - 2))
