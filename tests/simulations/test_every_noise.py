"""Every combination of noise that is not refused: a round's model has the noise that its epsilon counts, measured in the model itself."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers.experiments import digits
from helpers.protected import ended

from fedveil import Experiment, SettingsError
from fedveil.core.catalog import MECHANISMS
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.dp.accounting.guarantee import name_of
from fedveil.privacy.dp.adaptive import START
from fedveil.privacy.dp.distributed import LONGEST
from fedveil.privacy.plan import plan_for
from fedveil.server.federation import prepare

RATE, BATCH = 0.1, 4
# so much noise, or so little learning, that a model moves by noise alone
WHOLE = {"privacy.clip": 0.5, "privacy.noise_multiplier": 2.0, "training.learning_rate": 1e-12}
SINGLE = {"privacy.clip": 0.1, "privacy.noise_multiplier": 50.0, "training.learning_rate": RATE}
UNITS, PLACES = ("client", "example"), ("client", "server", "distributed")
VALUES: dict[str, tuple[Any, ...]] = {
    "privacy.protection": ("none", "secagg", "ckks", "bfv"),
    "federation.sampling": ("fixed", "poisson", "order"),
    "privacy.noise": ("independent", "banded"),
    "privacy.distribution": ("gaussian", "skellam"),
    "privacy.clip": (None, "adaptive"),
}


def experiment(choice: dict[str, Any]) -> Experiment | None:
    """The experiment of some settings; None where they are refused."""
    own = {key: value for key, value in choice.items() if value not in (None, "gaussian", "independent", "none")}
    many = choice["federation.sampling"] == "poisson" and choice["privacy.protection"] != "none"
    size = {"data.clients": 60, "federation.cohort": 50} if many else {"data.clients": 8, "federation.cohort": 4}
    noise = {**(SINGLE if choice["privacy.unit"] == "example" else WHOLE), **own}
    steps = {"training.steps": 1, "training.batch_size": BATCH, "model.hidden": [8]}
    rounds = 2 if choice["privacy.noise"] == "banded" else 1
    try:
        made = digits({**size, **steps, **noise, "federation.rounds": rounds, "engine": "batched"})
        prepare(made)
    except SettingsError:
        return None
    return made


@cache
def covered(unit: str, place: str) -> dict[str, Experiment]:
    """All that are not refused, by what is set."""
    found = {}
    for values in product(*VALUES.values()):
        choice = {"privacy.unit": unit, "privacy.noise_at": place, **dict(zip(VALUES, values, strict=True))}
        made = experiment(choice)
        if made is not None:
            found[" ".join(str(value) for value in values)] = made
    return found


def accounted(made: Experiment, clients: int) -> tuple[float, float]:
    """The noise of a model's numbers that epsilon counts, and how much more there may be: of so many clients that took part."""
    privacy, training, cohort = made.privacy, made.training, made.federation.cohort
    bound = START if privacy.clip == "adaptive" else float(privacy.clip or 0)
    sigma, more = privacy.noise_multiplier * bound, 1.0
    if privacy.unit == "example":
        sigma *= training.learning_rate / BATCH
    if privacy.noise_at == "client":
        return sigma / math.sqrt(clients), more  # each adds all of it, and they are averaged
    if privacy.clip == "adaptive":
        more *= math.sqrt(4 / 3)  # of the count of bits
    if privacy.noise == "banded":
        more *= math.sqrt(1 + 1 / 4)  # is taken back in the second round
    if privacy.noise_at == "distributed":
        more *= LONGEST * math.sqrt(clients / plan_for(made).honest)  # rounding lengthens updates, and all add a share
    return sigma / cohort, more


def first_model(made: Experiment) -> dict[str, np.ndarray]:
    task = load(made.data, made.seed).dataset.task
    return to_numpy(get(build(task, made.model, Stream(made.seed))))


def flat(weights: Any) -> np.ndarray:
    return np.concatenate([np.asarray(weights[name], np.float64).reshape(-1) for name in sorted(weights)])


def test_every_mechanism_is_covered() -> None:
    found = [made for unit, place in product(UNITS, PLACES) for made in covered(unit, place).values()]
    assert {name_of(made) for made in found} == set(MECHANISMS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("unit", UNITS)
def test_a_model_has_the_noise_that_is_accounted(unit, place, watched) -> None:
    for name, made in covered(unit, place).items():
        seen = ended(watched(made, name))
        moved = flat(seen.models[0]) - flat(first_model(made))
        clients = int(seen.table("metrics").clients[1])
        least, more = accounted(made, clients)
        found = float(np.sqrt(np.mean(moved**2)))
        error = 4 / math.sqrt(2 * moved.size)  # four standard errors
        assert least * (1 - error) < found < least * more * (1 + error), (name, found / least, more)
        assert np.isfinite(seen.table("metrics").epsilon[1:]).all()
