"""FedAvgM: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", section 4.3."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays, State, stateless
from fedveil.algorithms.fedavg import mean
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Fraction, Positive, Section


class FedAvgM(Section):
    """Settings of FedAvgM."""

    learning_rate: Positive = Field(1.0, description="eta of the server's SGD")
    momentum: Fraction = Field(0.9, description="beta of the server's SGD")


def apply(settings: FedAvgM, state: State, model: Arrays, mean: Arrays) -> tuple[State, Arrays]:
    """Step by SGD with momentum: v <- beta v + (w - mean), w <- w - eta v; float32.

    v starts as the first difference: adding it to a v of zero would change the sign of a zero.
    """
    beta, eta = settings.momentum, settings.learning_rate
    if beta == 0 and eta == 1:
        return state, mean
    step = {name: model[name] - value for name, value in mean.items()}
    if beta > 0:
        if state:
            step = {name: beta * state["momentum"][name] + difference for name, difference in step.items()}
        state = {"momentum": step}
    return state, {name: model[name] - eta * value for name, value in step.items()}


@part(FedAvgM, needs="mean", why="it computes with the mean of the weights")
def fedavgm(settings: FedAvgM, _: Experiment) -> Algorithm:
    """Return FedAvgM: SGD with momentum on the server."""
    return Algorithm(rule=mean, init=stateless, apply=partial(apply, settings))
