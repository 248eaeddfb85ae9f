"""What becomes of a noisy sum: against a slow sum by the book, with a public divisor, whoever answers."""

from __future__ import annotations

import math
import stat
from typing import Any

import numpy as np
import pytest
from helpers.support import CLIENTS, GLOBAL, LOCAL

from fedveil import Experiment, SettingsError
from fedveil.privacy.dp.adaptive import count_deviation, sum_multiplier
from fedveil.privacy.dp.noise import clip, norm
from fedveil.privacy.fixed_point import Layout, flatten, quantize, unflatten
from fedveil.privacy.plan import plan_for
from fedveil.server.protection.masked import on_grid
from fedveil.server.protection.noise import KEY, NoisySum, noise_key, noisy_sum, server_draw


def still(size: int) -> np.ndarray:
    return np.zeros(size)


def update(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: weights[name].astype(np.float64) - GLOBAL[name] for name in GLOBAL}


def slow(bound: float, divisor: int, weights: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """given + sum of clip(w_k - given) / divisor, a client and a tensor at a time."""
    clipped = [clip(update(own), bound) for own in weights]
    return {name: GLOBAL[name] + sum((own[name] for own in clipped), np.zeros(1)) / divisor for name in GLOBAL}


@pytest.mark.parametrize("bound", [0.01, 3.0, 1e6])
@pytest.mark.parametrize("divisor", [CLIENTS, 20])
def test_a_sum_of_updates_is_the_one_that_is_clipped_and_added_one_by_one(bound, divisor) -> None:
    made = NoisySum(GLOBAL, bound, divisor, 1.0, still).of_updates(LOCAL)
    for name, value in slow(bound, divisor, LOCAL).items():
        assert made[name].dtype == np.float32
        np.testing.assert_allclose(made[name], value, rtol=1e-6, atol=1e-7)


def test_an_update_that_is_not_finite_counts_as_zero() -> None:
    bad = [{name: value.copy() for name, value in own.items()} for own in LOCAL[:3]]
    bad[0]["dense.bias"][1], bad[1]["dense.weight"][0, 0], bad[2]["dense.bias"][0] = np.nan, np.inf, 3e38
    made = NoisySum(GLOBAL, 1.0, CLIENTS, 1.0, still).of_updates([*bad, *LOCAL[3:]])
    wanted = slow(1.0, CLIENTS, [bad[2], *LOCAL[3:]])  # a number that is large is finite
    for name, value in wanted.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-6, atol=1e-7)


def test_a_client_that_is_missing_moves_the_mean_by_its_clipped_update_and_no_more() -> None:
    """The divisor does not follow who answered: neighbours' sums differ by C / K, over every client there is."""
    whole = NoisySum(GLOBAL, 0.5, CLIENTS, 1.0, still).of_updates(LOCAL)
    for k in range(CLIENTS):
        rest = NoisySum(GLOBAL, 0.5, CLIENTS, 1.0, still).of_updates(LOCAL[:k] + LOCAL[k + 1 :])
        moved = {name: whole[name].astype(np.float64) - rest[name] for name in GLOBAL}
        assert norm(moved) <= 0.5 / CLIENTS * (1 + 1e-5)


def test_a_sum_of_nobody_is_noise_alone() -> None:
    random = np.random.default_rng(1)
    made = NoisySum(GLOBAL, 0.5, 8, 2.0, random.standard_normal).of_updates([])
    flat = np.concatenate([(made[name] - GLOBAL[name]).reshape(-1) for name in GLOBAL])
    np.testing.assert_allclose(flat, np.random.default_rng(1).standard_normal(flat.size) * 2 / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("answered", [1, 5, CLIENTS])
def test_a_mean_that_was_opened_becomes_the_sum_over_the_public_divisor(answered) -> None:
    clipped = [clip(update(own), 0.7) for own in LOCAL[:answered]]
    mean = {name: GLOBAL[name] + sum(own[name] for own in clipped) / answered for name in GLOBAL}
    made = NoisySum(GLOBAL, 0.7, 12, 1.0, still).of_mean(mean, answered, flatten(GLOBAL, np.float64))
    for name, value in slow(0.7, 12, LOCAL[:answered]).items():
        np.testing.assert_allclose(made[name], value, rtol=1e-6, atol=1e-7)


def experiment(**settings: Any) -> Experiment:
    few = {"data.clients": 40, "federation.cohort": 10, "privacy.clip": 0.5, "privacy.noise_multiplier": 2.0}
    return Experiment.preset("digits").override({**few, "privacy.noise_at": "server", **settings})


def made(settings: Experiment, asked: int, bound: float | None = None) -> NoisySum | None:
    return noisy_sum(
        settings, 3, GLOBAL, asked, bound, server_draw(settings, None, secret=False), secret=False, learning_rate=0.1
    )


@pytest.mark.parametrize(
    ("sampling", "asked", "divisor"),
    [("fixed", 7, 7), ("order", 7, 7), ("order", 0, 10), ("poisson", 7, 10), ("poisson", 0, 10)],
)
def test_the_divisor_is_the_number_asked_and_of_cohorts_by_coins_their_average(sampling, asked, divisor) -> None:
    found = made(experiment(**{"federation.sampling": sampling}), asked)
    assert found is not None
    assert (found.divisor, found.bound, found.deviation, found.count) == (divisor, 0.5, 1.0, None)


def test_a_bound_that_changes_has_the_noise_of_the_sum_and_of_the_count() -> None:
    found = made(experiment(**{"privacy.clip": "adaptive"}), 10, 0.3)
    assert found is not None
    assert found.deviation == pytest.approx(sum_multiplier(2.0, 10) * 0.3)
    assert found.count == count_deviation(2.0, 10) == 2.0
    shares = [
        NoisySum(GLOBAL, 1, 10, 1, still, (0, 0.0), 2.0, np.random.default_rng(n).standard_normal).share_within(8, 10)
        for n in range(400)
    ]
    assert abs(np.mean(shares) - 0.8) < 5 * 0.2 / 20
    assert abs(np.std(shares) / 0.2 - 1) < 5 / math.sqrt(800)


def test_where_clients_add_the_noise_the_server_adds_none() -> None:
    assert made(experiment(**{"privacy.noise_at": "client"}), 10) is None
    shares = experiment(**{"privacy.noise_at": "distributed", "privacy.protection": "secagg"})
    found = made(shares, 10)
    assert found is not None
    assert found.deviation == 0
    assert made(Experiment.preset("digits"), 10) is None


def test_a_rounds_noise_is_its_own_and_a_simulations_is_the_seeds() -> None:
    draws = [server_draw(experiment(seed=seed), None, secret=False) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0](1, 9), draws[1](1, 9))
    for other in (draws[0](2, 9), draws[2](1, 9), server_draw(experiment(), None, secret=True)(1, 9)):
        assert not np.isin(other, draws[0](1, 9)).any()
    secret = server_draw(experiment(), None, secret=True)
    assert (secret(1, 9) != secret(1, 9)).all()


def test_the_key_of_noise_that_is_taken_back_is_the_servers_alone_and_must_be_there(tmp_path) -> None:
    path = tmp_path / "run.noise-key"
    key = noise_key(path, begins=True)
    assert len(key) == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert noise_key(path, begins=False) == key
    assert noise_key(path, begins=True) != key  # a run that begins anew under the name
    path.write_bytes(b"short")
    with pytest.raises(
        SettingsError, match=r"run\.noise-key: .* cannot be read \(it has 5 bytes of 32\).*start a new run"
    ):
        noise_key(path, begins=False)
    path.unlink()
    with pytest.raises(SettingsError, match="No such file"):
        noise_key(path, begins=False)


def test_banded_noise_under_a_key_is_repeated_by_who_has_it() -> None:
    banded = experiment(**{"federation.sampling": "order", "privacy.noise": "banded"})
    one, other, third = (server_draw(banded, key, secret=True) for key in (bytes(32), bytes(32), bytes(31) + b"\1"))
    rounds = [one(number, 7) for number in range(1, 5)]
    np.testing.assert_array_equal(other(4, 7), rounds[3])
    assert not np.isin(third(4, 7), rounds[3]).any()


@pytest.mark.parametrize("answered", [1, 3, 8])
def test_missing_shares_of_noise_are_added_so_that_the_noise_tells_nothing_of_how_many_there_were(answered) -> None:
    given = {"w": np.zeros(20_000, np.float32)}
    random = np.random.default_rng(answered)
    shares = random.normal(0, 0.5, (answered, 20_000))  # what the clients added themselves
    noisy = NoisySum(given, 1.0, 4, 0.0, random.standard_normal, (8, 0.5))
    made = noisy.of_mean({"w": shares.mean(axis=0)}, answered, np.zeros(20_000))
    assert abs(made["w"].std() * 4 / (0.5 * math.sqrt(8)) - 1) < 5 / math.sqrt(2 * 20_000)


def test_shares_are_topped_up_only_where_coins_hide_how_many_there_are() -> None:
    shares = {
        "privacy.noise_at": "distributed",
        "privacy.protection": "secagg",
        "data.clients": 200,
        "federation.cohort": 100,
    }
    fixed, coins = (made(experiment(**{**shares, "federation.sampling": way}), 100) for way in ("fixed", "poisson"))
    assert fixed is not None
    assert coins is not None
    assert fixed.shares == (0, 0.0)
    most, own = coins.shares
    assert most > 130
    assert own * math.sqrt(100) > 2.0 * 0.5  # z C: some may be missing, and some may tell theirs


@pytest.mark.parametrize("range_", [0.3, 6.0])
def test_a_client_that_is_missing_under_a_grid_moves_the_model_by_its_own_update_alone(range_) -> None:
    """A model beyond the range, or off the grid: who is in the sum shows by nobody's distance from it."""
    settings = experiment(**{"privacy.protection": "secagg", "privacy.protection.range": range_})
    plan = plan_for(settings)
    given = flatten(GLOBAL)
    assert (np.abs(given) > 0.3).any()
    on = on_grid(given, plan, plan.cohort)
    unchanged, _ = quantize(given, 1, plan.cohort, plan.grid, Layout.of(GLOBAL))
    np.testing.assert_allclose(on, unchanged * plan.unit, atol=1e-12)
    mean = unflatten(on, Layout.of(GLOBAL))  # of clients whose updates are zero
    found = [
        flatten(NoisySum(GLOBAL, 0.5, 12, 1.0, still).of_mean(mean, clients, on), np.float64) for clients in (1, 9, 15)
    ]
    for one in found:
        np.testing.assert_array_equal(one, on.astype(np.float32))
