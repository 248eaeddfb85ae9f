"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (MLSys), algorithm 2."""

from __future__ import annotations

from fedveil.algorithms.algorithm import Algorithm
from fedveil.algorithms.fedavg import mean
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NoSettings


def check(_: NoSettings, experiment: Experiment) -> None:
    """Raise SettingsError where mu is 0, with which FedProx is FedAvg."""
    if experiment.training.proximal_mu == 0:
        raise SettingsError(
            "federation.strategy = 'fedprox': with training.proximal_mu = 0 it is fedavg; set training.proximal_mu, 0.01 say"
        )


@part(needs="sum", check=check)
def fedprox(_: NoSettings, experiment: Experiment) -> Algorithm:
    """Return FedProx: FedAvg whose clients add mu/2 |w - w_global|^2 to their loss; mu is `training.proximal_mu`."""
    return Algorithm(rule=mean, config={"proximal-mu": experiment.training.proximal_mu})
