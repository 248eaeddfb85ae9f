"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (MLSys), algorithm 2."""

from __future__ import annotations

from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm
from fedveil.algorithms.fedavg import mean
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NonNegative, Section


class FedProx(Section):
    """Settings of FedProx."""

    proximal_mu: NonNegative = Field(0.0, description="mu of the term mu/2 |w - w_global|^2 in each client's loss")


def check(settings: FedProx, experiment: Experiment) -> None:
    """Raise SettingsError where mu is zero, which is FedAvg."""
    if settings.proximal_mu == 0:
        raise SettingsError(
            "federation.strategy = 'fedprox': with training.proximal_mu = 0 it is fedavg; set training.proximal_mu, 0.01 say"
        )


@part(FedProx, needs="sum", check=check)
def fedprox(settings: FedProx) -> Algorithm:
    """FedProx: FedAvg whose clients add mu/2 |w - w_global|^2 to their loss."""
    return Algorithm(rule=mean, config={"proximal-mu": settings.proximal_mu})
