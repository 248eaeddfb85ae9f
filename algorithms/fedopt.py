"""FedAdam, FedYogi and FedAdagrad: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.

With D the mean of the weights minus the model: m <- beta_1 m + (1 - beta_1) D, w <- w + eta m / (sqrt(v) + tau). The
three differ in v.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays, State
from fedveil.algorithms.fedavg import mean
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Fraction, Positive, Section

WHY = "it computes with the mean of the weights"


class FedAdagrad(Section):
    """Settings of FedAdagrad."""

    learning_rate: Positive = Field(0.1, description="eta of the server's optimiser")
    tau: Positive = Field(1e-3, description="adaptivity: the smaller, the more each weight has a rate of its own")


class FedAdam(FedAdagrad):
    """Settings of FedAdam and FedYogi."""

    beta_1: Fraction = Field(0.9, description="decay of the first moment")
    beta_2: Fraction = Field(0.99, description="decay of the second moment")


def init(model: Arrays) -> State:
    """Return moments of zero, float32, and t = 0 rounds done."""
    return {
        "t": 0,
        "m": {name: np.zeros_like(value) for name, value in model.items()},
        "v": {name: np.zeros_like(value) for name, value in model.items()},
    }


def adam(settings: FedAdam, state: State, model: Arrays, mean: Arrays) -> tuple[State, Arrays]:
    """Step by Adam: v <- beta_2 v + (1 - beta_2) D^2.

    As in Flower but not in Reddi et al., eta is corrected for the moments' bias (Kingma and Ba 2015, section 2), with
    t + 1 in place of t. NumPy's powers make eta float64, and so the result.
    """
    beta_1, beta_2, t = settings.beta_1, settings.beta_2, state["t"] + 1
    difference, m = _first_moment(beta_1, state, model, mean)
    v = {name: beta_2 * v + (1 - beta_2) * difference[name] ** 2 for name, v in state["v"].items()}
    eta = settings.learning_rate * np.sqrt(1 - np.power(beta_2, t + 1.0)) / (1 - np.power(beta_1, t + 1.0))
    return {"t": t, "m": m, "v": v}, _step(model, eta, m, v, settings.tau)


def yogi(settings: FedAdam, state: State, model: Arrays, mean: Arrays) -> tuple[State, Arrays]:
    """Step by Yogi: v <- v - (1 - beta_2) D^2 sign(v - D^2); float32."""
    difference, m = _first_moment(settings.beta_1, state, model, mean)
    v = {
        name: v - (1 - settings.beta_2) * difference[name] ** 2 * np.sign(v - difference[name] ** 2)
        for name, v in state["v"].items()
    }
    return {"t": state["t"] + 1, "m": m, "v": v}, _step(model, settings.learning_rate, m, v, settings.tau)


def adagrad(settings: FedAdagrad, state: State, model: Arrays, mean: Arrays) -> tuple[State, Arrays]:
    """Step by Adagrad: v <- v + D^2, with beta_1 = 0; float32."""
    difference, m = _first_moment(0.0, state, model, mean)
    v = {name: v + difference[name] ** 2 for name, v in state["v"].items()}
    return {"t": state["t"] + 1, "m": m, "v": v}, _step(model, settings.learning_rate, m, v, settings.tau)


def _first_moment(beta_1: float, state: State, model: Arrays, mean: Arrays) -> tuple[Arrays, Arrays]:
    """Return D = mean - w, and m <- beta_1 m + (1 - beta_1) D."""
    difference = {name: mean[name] - value for name, value in model.items()}
    return difference, {name: beta_1 * m + (1 - beta_1) * difference[name] for name, m in state["m"].items()}


def _step(model: Arrays, eta: Any, m: Arrays, v: Arrays, tau: float) -> Arrays:
    """Return w + eta m / (sqrt(v) + tau)."""
    return {name: value + eta * m[name] / (np.sqrt(v[name]) + tau) for name, value in model.items()}


@part(FedAdam, needs="mean", why=WHY)
def fedadam(settings: FedAdam, _: Experiment) -> Algorithm:
    """Return FedAdam: Adam on the server."""
    return Algorithm(rule=mean, init=init, apply=partial(adam, settings))


@part(FedAdam, needs="mean", why=WHY)
def fedyogi(settings: FedAdam, _: Experiment) -> Algorithm:
    """Return FedYogi: Yogi on the server."""
    return Algorithm(rule=mean, init=init, apply=partial(yogi, settings))


@part(FedAdagrad, needs="mean", why=WHY)
def fedadagrad(settings: FedAdagrad, _: Experiment) -> Algorithm:
    """Return FedAdagrad: Adagrad on the server."""
    return Algorithm(rule=mean, init=init, apply=partial(adagrad, settings))
