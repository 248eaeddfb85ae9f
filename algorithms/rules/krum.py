"""Krum and Multi-Krum: Blanchard et al. 2017, "Machine Learning with Adversaries", sections 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort
from fedveil.algorithms.fedavg import weighted_mean
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Count, NoSettings, Section

WHY = "Krum compares updates"
USES = ("byzantine_clients",)


class MultiKrum(Section):
    """Settings of Multi-Krum."""

    selected: Count | None = Field(
        None, description="m: updates to average; cohort - byzantine_clients - 2 without it, the most there can be"
    )


def by_score(weights: Sequence[Arrays], byzantine: int) -> list[int]:
    """Return the clients' positions by score, the least first.

    A client's score is the sum of the squared distances from its update to the n - f - 2 nearest others.
    byzantine: f. As in Flower, distances are |x|^2 + |y|^2 - 2 xy in float32, so near neighbours may be ordered
    otherwise than by exact distances. The smallest distance in a client's row is taken to be that to itself.
    """
    flat = np.stack([np.concatenate(list(own.values()), axis=None) for own in weights])  # [n, P]
    norms = np.square(flat).sum(axis=1)
    distances = norms[:, None] + norms[None, :] - 2 * flat @ flat.T  # [n, n]
    others = max(1, len(weights) - byzantine - 2)
    scores = [np.sum(row[np.argsort(row)[1 : others + 1]]) for row in distances]
    return [int(position) for position in np.argsort(scores)]


def multikrum_mean(cohort: Cohort, byzantine: int, selected: int) -> Arrays:
    """Return the mean of the `selected` updates of least score, weighted by examples, summed in the order of scores."""
    chosen = [cohort.contributions[i] for i in by_score(cohort.weights, byzantine)[:selected]]
    return weighted_mean([one.weights for one in chosen], [one.examples for one in chosen])


def check(_: Section, experiment: Experiment) -> None:
    """Raise SettingsError where the cohort is smaller than 2 f + 3."""
    require_cohort(experiment, 2 * experiment.federation.byzantine_clients + 3)


def check_selected(settings: MultiKrum, experiment: Experiment) -> None:
    """Raise SettingsError where the cohort is smaller than 2 f + 3, or more updates are selected than n - f - 2."""
    check(settings, experiment)
    most = experiment.federation.cohort - experiment.federation.byzantine_clients - 2
    if (settings.selected or 1) > most:
        raise SettingsError(
            f"federation.strategy.selected = {settings.selected}: {experiment.federation.strategy} can select at most cohort - "
            f"byzantine_clients - 2 = {most} updates"
        )


def require_cohort(experiment: Experiment, least: int) -> None:
    """Raise SettingsError where the cohort is smaller than `least`, the fewest clients that a rule needs."""
    settings = experiment.federation
    if settings.cohort < least:
        raise SettingsError(
            f"federation.cohort = {settings.cohort}: {settings.strategy} with federation.byzantine_clients = "
            f"{settings.byzantine_clients} needs at least {least}"
        )


@part(needs="each", uses=USES, why=WHY, check=check)
def krum(_: NoSettings, experiment: Experiment) -> Algorithm:
    """Return Krum: the one update closest to its neighbours."""
    liars = experiment.federation.byzantine_clients
    return Algorithm(rule=lambda cohort: multikrum_mean(cohort, liars, 1))


@part(MultiKrum, needs="each", uses=USES, why=WHY, check=check_selected)
def multikrum(settings: MultiKrum, experiment: Experiment) -> Algorithm:
    """Return Multi-Krum: the mean, weighted by examples unlike the paper's, of the updates closest to neighbours."""
    liars = experiment.federation.byzantine_clients
    return Algorithm(rule=lambda cohort: multikrum_mean(cohort, liars, settings.selected or cohort.size - liars - 2))
