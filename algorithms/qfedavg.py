"""q-FedAvg: Li et al. 2020, "Fair Resource Allocation in Federated Learning" (ICLR), algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NonNegative, Section

GLOBAL_LOSS = "global-loss"  # the metric in which a client reports F_k(w)
SMALLEST = 1e-10  # is added to a loss, so that its powers are finite


class QFedAvg(Section):
    """Settings of q-FedAvg."""

    q: NonNegative = Field(0.1, description="fairness: 0 weighs all clients alike, more weighs those of high loss more")


def aggregate(model: Arrays, weights: Sequence[Arrays], losses: Sequence[float], q: float, lipschitz: float) -> Arrays:
    """Return w - sum_k D_k / sum_k h_k, float64, in the order of the clients.

    With u_k = L (w - w_k): D_k = F_k^q u_k, and h_k = q F_k^(q-1) |u_k|^2 + L F_k^q.
    losses: F_k, the loss of the model that was sent on each client's examples; lipschitz: L
    D_k and its sum are float32, h_k float64, as in Flower.
    """
    total: dict[str, np.ndarray] = {}
    h = 0.0
    for own, loss in zip(weights, losses, strict=True):
        update = {name: (value - own[name]) * lipschitz for name, value in model.items()}
        norm = float(sum(np.sum(np.square(value)) for value in update.values()))
        power = np.float_power(loss + SMALLEST, q)
        delta = {name: (value * power).astype(value.dtype) for name, value in update.items()}
        total = {name: total[name] + value for name, value in delta.items()} if total else delta
        h += q * np.float_power(loss + SMALLEST, q - 1) * norm + lipschitz * power
    return {name: value - total[name] / h for name, value in model.items()}


@part(
    QFedAvg,
    needs="each",
    why="q-FedAvg weighs each update by its loss at the server",
)
def qfedavg(settings: QFedAvg, _: Experiment) -> Algorithm:
    """Return q-FedAvg: clients with a higher loss weigh more; L = 1 / the round's learning rate (section 3.3)."""

    def rule(cohort: Cohort) -> Arrays:
        losses = [float(one.metrics[GLOBAL_LOSS]) for one in cohort.contributions]
        return aggregate(cohort.model, cohort.weights, losses, settings.q, 1.0 / cohort.learning_rate)

    return Algorithm(rule, config={"report-global-loss": True}, reports=(GLOBAL_LOSS,))
