"""Rounds whose clients add shares of exact noise: what is unmasked and decrypted is the sum in whole numbers, noise and all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from helpers.protected import Made, Observed, Sent, Weights, assert_same, ended, small

from fedveil import Experiment
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.plan import make_plan, noise_share

CLIENTS, Z = 5, 2.0
STILL = {"training.learning_rate": 1e-12, "model.hidden": [128, 64]}  # updates are nothing, and the rest is noise


def noisy(protection: str, **settings: Any) -> Experiment:
    noise = {"privacy__clip": 1.0, "privacy__noise_multiplier": Z, "privacy__noise_at": "distributed"}
    return small(protection, **noise).override(settings)


def first_model(experiment: Experiment) -> Weights:
    task = load(experiment.data, experiment.seed).dataset.task
    return to_numpy(get(build(task, experiment.model, Stream(experiment.seed))))


def lost(*clients: int) -> Callable[[Sent, Message], Sequence[Message]]:
    """A network that loses the second round's updates of some clients."""
    return lambda sent, reply: [] if (sent.stage, sent.round) == ("train", 2) and sent.client in clients else [reply]


def flat(weights: Weights) -> np.ndarray:
    return np.concatenate([np.asarray(weights[name], np.float64).reshape(-1) for name in sorted(weights)])


def mean_of(experiment: Experiment, made: Made, clients: Sequence[int]) -> np.ndarray:
    """The model that a round of these clients must make: whole numbers added up, and one multiplication."""
    step, total = (
        make_plan(experiment.privacy, CLIENTS).grid.step,
        sum(in_units(experiment, made[k][0]) for k in clients),
    )
    return np.asarray(total * (step / (len(clients) / CLIENTS)), np.float32)


def in_units(experiment: Experiment, weights: Weights) -> np.ndarray:
    """What a client sent, which must be whole numbers of the plan's unit."""
    numbers = flat(weights) / make_plan(experiment.privacy, CLIENTS).unit
    assert abs(numbers - np.rint(numbers)).max() < 1e-6
    return np.rint(numbers).astype(np.int64)


def noise_of(experiment: Experiment, seen: Observed, number: int) -> dict[int, np.ndarray]:
    """Each client's noise in a round, in units, where updates are nothing: what it sent less the rounded model."""
    before = seen.models[number - 2] if number > 1 else first_model(experiment)
    unit, limit = make_plan(experiment.privacy, CLIENTS).unit, make_plan(experiment.privacy, CLIENTS).grid.limit
    known = np.rint(np.clip(flat(before), -limit, limit) / unit).astype(np.int64)
    return {client: in_units(experiment, made) - known for client, (made, _) in seen.made[number - 1].items()}


@pytest.mark.parametrize("distribution", ["gaussian", "skellam"])
@pytest.mark.parametrize(
    ("protection", "engine"), [("secagg", "sequential"), ("secagg", "batched"), ("bfv", "batched")]
)
def test_a_round_is_the_exact_sum_of_what_clients_rounded_and_added(protection, engine, distribution, watched) -> None:
    experiment = noisy(protection, engine=engine, **{"privacy.distribution": distribution})
    seen = ended(watched(experiment))
    for number in (1, 2):
        made = seen.made[number - 1]
        assert {examples for _, examples in made.values()} == {1}
        assert all(abs(in_units(experiment, weights)).max() > 0 for weights, _ in made.values())
        np.testing.assert_array_equal(flat(seen.models[number - 1]), mean_of(experiment, made, range(CLIENTS)))


@pytest.mark.parametrize("distribution", ["gaussian", "skellam"])
@pytest.mark.parametrize("protection", ["secagg", "bfv"])
def test_the_sums_noise_has_the_deviation_of_a_servers(protection, distribution, watched) -> None:
    experiment = noisy(protection, engine="batched", **STILL, **{"privacy.distribution": distribution})
    seen = ended(watched(experiment))
    plan = make_plan(experiment.privacy, CLIENTS)
    size = flat(seen.models[0]).size
    share = noise_share(experiment.privacy, plan, size)
    rounds = [noise_of(experiment, seen, number) for number in (1, 2)]
    own = np.concatenate([noise for made in rounds for noise in made.values()])
    assert abs(own.var() / share.deviation**2 - 1) < 0.01
    central = Z * share.lengthening(1.0)  # of a server that hides as long an update
    total = np.concatenate([sum(made.values()) for made in rounds]) * plan.unit
    wanted = central * math.sqrt(CLIENTS / plan.honest)
    assert abs(total.var() / wanted**2 - 1) < 0.02  # 3 standard errors of so many numbers
    assert total.std() >= Z
    sums = [flat(seen.models[0]) * CLIENTS, flat(seen.models[1]) * CLIENTS]
    assert abs(sums[0] - flat(first_model(experiment)) * CLIENTS).std() > Z / 2  # it is in the model that was opened


def test_every_client_and_every_round_has_noise_of_its_own(watched) -> None:
    experiment = noisy("secagg", engine="batched", **STILL)
    seen = ended(watched(experiment))
    drawn = [noise for number in (1, 2) for noise in noise_of(experiment, seen, number).values()]
    assert len(drawn) == 2 * CLIENTS
    close = np.corrcoef(drawn) - np.eye(len(drawn))
    assert abs(close).max() < 6 / math.sqrt(drawn[0].size)
    again = ended(watched(experiment, "again"))  # a simulation's is the seed's, and can be repeated
    assert_same(again.models[1], seen.models[1])


def test_those_that_stay_leave_as_much_noise_and_no_sum_of_fewer_is_unmasked(watched) -> None:
    experiment = noisy("secagg", engine="batched", **STILL)
    plan = make_plan(experiment.privacy, CLIENTS)
    assert (plan.least, plan.honest) == (4, 3)
    seen = ended(watched(experiment, home=lost(3)))
    made = seen.made[1]
    left = [client for client in range(CLIENTS) if client != 3]
    known = np.rint(np.clip(flat(seen.models[0]), -plan.grid.limit, plan.grid.limit) / plan.unit)
    before = known * plan.unit
    moved = len(left) * (mean_of(experiment, made, left).astype(np.float64) - before)
    np.testing.assert_allclose(flat(seen.models[1]), before + moved / CLIENTS, rtol=1e-6, atol=1e-6)
    noise = noise_of(experiment, seen, 2)
    told = 1  # of those that stay, who may tell their own
    total = sum(noise[client] for client in left[told:]) * plan.unit
    assert total.std() > Z * 0.99
    two = ended(watched(experiment, "two", home=lost(1, 3)))
    assert_same(two.models[1], two.models[0])  # the round is left out
    assert any("round 2: left out" in warning and "nothing was revealed" in warning for warning in two.warnings)


def test_noise_outlives_a_model_beyond_the_range(watched) -> None:
    """Weights that noise moved out of the range are clipped before the next round's noise, not after."""
    experiment = noisy("secagg", engine="batched", **STILL, **{"privacy.protection.range": 0.5})
    seen = ended(watched(experiment))
    out = abs(flat(seen.models[0])) > 0.5
    assert out.mean() > 0.3
    share = noise_share(experiment.privacy, make_plan(experiment.privacy, CLIENTS), out.size)
    for noise in noise_of(experiment, seen, 2).values():
        assert abs(noise[out].std() / share.deviation - 1) < 0.05
        assert abs(noise[out].mean()) < 6 * share.deviation / math.sqrt(out.sum())
