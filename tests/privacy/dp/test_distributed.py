"""Shares of noise: how much each client adds, how long a rounded update is, and what the sum is accounted as."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm as normal
from scipy.stats import skellam

from fedveil import Experiment, SettingsError
from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.defences import defend
from fedveil.privacy.defences import share as what_is_sent
from fedveil.privacy.dp.distributed import (
    FAR,
    FINEST,
    LONGEST,
    SMOOTH,
    NoiseShare,
    _factor,
    contribution,
    divergences,
    effective_multiplier,
    honest_clients,
    noise_share,
    rounded_square,
)
from fedveil.privacy.dp.samplers import gaussian_table, secret_bytes, skellam_table
from fedveil.privacy.plan import RING, UNITS, Plan, make_plan
from fedveil.privacy.plan import noise_share as share_of

MODELS = {"digits": 17_226, "mnist-mlp": 55_050, "mnist-2nn": 199_210, "sms": 150_000}


def distributed(protection: str = "secagg", **settings: object) -> Privacy:
    given = {"clip": 1.0, "noise_multiplier": 3.0, "noise_at": "distributed", "protection": protection}
    return Privacy.model_validate(given | settings)


def shifted(weights: np.ndarray, by: int) -> np.ndarray:
    return np.roll(weights, by)


def gaussian_pmf(sigma: float, reach: int) -> np.ndarray:
    weights = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    return weights / weights.sum()


def sum_pmf(sigma: float, clients: int, reach: int) -> np.ndarray:
    """The distribution of a sum of independent discrete Gaussian numbers, by convolution, on -reach to reach."""
    one = gaussian_pmf(sigma, reach)
    total = one
    for _ in range(clients - 1):
        total = np.convolve(total, one)[reach:-reach]
    return total


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, for a sensitivity of mu standard deviations."""
    return float(normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + normal.logcdf(-epsilon / mu - mu / 2)))


# how much noise


@pytest.mark.parametrize(
    ("clients", "missing", "colluding", "left"),
    [
        (100, 0.0, 0.0, 99),
        (100, 0.2, 0.0, 79),
        (100, 0.2, 0.2, 60),
        (100, 0.29, 0.0, 70),
        (5, 0.2, 0.2, 3),
        (3, 0.5, 0.4, 1),
    ],
)
def test_honest_clients_are_those_that_stay_and_tell_nobody_their_noise(clients, missing, colluding, left) -> None:
    assert honest_clients(clients, missing, colluding) == left


@given(st.floats(0.1, 20), st.floats(1e-3, 10), st.floats(1e-5, 1e-2), st.integers(1, 500), st.integers(1, 10**6))
def test_the_noise_of_those_that_are_left_is_z_times_a_rounded_update(z, bound, unit, honest, size) -> None:
    share = noise_share(z, bound, unit, honest, size)
    assert math.sqrt(honest) * share.deviation == pytest.approx(z * share.sensitivity)
    assert share.sensitivity * unit >= bound
    assert math.sqrt(honest) * share.deviation * unit >= z * bound * (1 - 1e-12)


def test_the_bound_of_a_rounded_norm_is_the_published_one() -> None:
    """Kairouz et al. 2021, theorem 1, with gamma = 1: 0.3 % more for digits at 1,000 units, and sqrt(d) where d is small."""
    assert rounded_square(1000, 17_226) == math.ceil(1000**2 + 17_226 / 4 + 1000 + math.sqrt(17_226) / 2)
    assert rounded_square(1000, 1) == min(1001**2, math.ceil(1000**2 + 0.25 + 1000 + 0.5))
    assert rounded_square(10, 10**6) < (10 + 1000) ** 2
    assert rounded_square(0.5, 1) == math.ceil(min(2.25, 0.25 + 0.25 + 1))


def test_secure_aggregation_lengthens_updates_by_half_a_percent_at_most() -> None:
    for size, clients, z in product(MODELS.values(), (50, 100, 1000), (0.5, 1.0, 3.0)):
        privacy = distributed(noise_multiplier=z)
        share = share_of(privacy, make_plan(privacy, clients), size)
        assert 1 <= share.lengthening(1.0) <= 1.005, (size, clients, z)


# what a client sends


@pytest.mark.parametrize("distribution", ["gaussian", "skellam"])
def test_a_contribution_is_the_public_model_a_bounded_update_and_noise(distribution, monkeypatch) -> None:
    rng, unit, limit = np.random.default_rng(0), 0.01, 1.5
    before = rng.uniform(-3, 3, 500)  # many weights are beyond the range, from which the noise moved them
    update = rng.normal(size=500)
    update /= np.linalg.norm(update)
    share = noise_share(2.0, 1.0, unit, 4, 500, distribution)
    known, added = contribution(before, update, limit, share, rng.bytes)
    still, silent = contribution(before, 0 * update, limit, share, rng.bytes)
    np.testing.assert_array_equal(known, still)  # nothing of the update is in it
    assert abs(known).max() <= limit / unit
    np.testing.assert_allclose(known * unit, np.clip(before, -limit, limit), atol=unit)
    table = gaussian_table if distribution == "gaussian" else skellam_table
    assert share.table is table(share.deviation)
    for moved in (added, silent):
        assert abs(moved.std() / share.deviation - 1) < 0.2
    monkeypatch.setattr(NoiseShare, "table", _Nothing())
    _, own = contribution(before, update, limit, share, rng.bytes)
    assert own @ own <= share.square
    np.testing.assert_allclose(
        own * unit, np.clip(before + update, -limit, limit) - np.clip(before, -limit, limit), atol=unit
    )
    _, own = contribution(before, 0 * update, limit, share, rng.bytes)
    assert not own.any()


class _Nothing:
    """A distribution without noise, so that a rounded update is seen alone."""

    @staticmethod
    def draw(size: int, _random: object) -> np.ndarray:
        return np.zeros(size, np.int64)


def test_an_update_that_nobody_clipped_is_refused() -> None:
    share = noise_share(2.0, 1.0, 0.01, 4, 3)
    with pytest.raises(ProtectionError, match="it was not clipped"):
        contribution(np.zeros(3), np.array([0.0, 1.5, 0.0]), 6.0, share, secret_bytes)


def test_a_share_that_nothing_sums_up_is_not_sent() -> None:
    given = {"w": np.zeros(3, np.float32)}
    with pytest.raises(ProtectionError, match="hides nothing by itself"):
        defend(distributed("none"), given, given, Stream(0), secret=True)
    other = make_plan(Privacy(protection="ckks"), 5)
    with pytest.raises(ProtectionError, match="hides nothing without a protection that adds whole numbers"):
        what_is_sent(distributed("ckks"), other, given, given, Stream(0), secret=True)


def test_a_model_that_is_not_finite_gets_no_answer() -> None:
    given = {"a": np.zeros(2, np.float32), "b": np.array([0, np.nan], np.float32)}
    with pytest.raises(ProtectionError, match="b of the model that was sent holds a number that is not finite"):
        what_is_sent(distributed(), make_plan(distributed(), 5), given, given, Stream(0), secret=True)


def test_secret_noise_is_never_the_same_and_seeded_noise_always() -> None:
    given, plan = {"w": np.zeros(50, np.float32)}, make_plan(distributed(), 5)

    def drawn(secret: bool, number: int) -> np.ndarray:
        return what_is_sent(distributed(), plan, given, given, Stream(0, number), secret=secret)[1]["w"]  # type: ignore[index, no-any-return]

    np.testing.assert_array_equal(drawn(False, 1), drawn(False, 1))
    assert (drawn(False, 1) != drawn(False, 2)).any()
    assert (drawn(True, 1) != drawn(True, 1)).any()


# what the sum is accounted as


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.8), (0.7, 1.5), (1.0, 1.0)])
def test_sums_of_discrete_gaussians_are_discrete_gaussians_but_for_the_factor_that_is_derived(a, b) -> None:
    reach = 60
    found = np.convolve(gaussian_pmf(a, reach), gaussian_pmf(b, reach))[reach:-reach]
    wanted = gaussian_pmf(math.hypot(a, b), reach)
    near = slice(reach - 6, reach + 7)
    off = float(np.abs(np.log(found[near] / wanted[near])).max())
    smooth = a * b / math.hypot(a, b)
    k = 2 * sum(math.exp(-2 * (math.pi * smooth * j) ** 2) for j in range(1, 9))
    assert off <= math.log((1 + k) / (1 - k))
    assert off > math.log((1 + k) / (1 - k)) / 4  # the factor is no empty promise


@pytest.mark.parametrize(("sigma", "smooth"), [(1.1, 0.7), (2.0, 0.8), (1.5, 1.0)])
def test_a_whole_number_drawn_about_a_gaussian_one_is_a_discrete_gaussian_but_for_that_factor(sigma, smooth) -> None:
    whole, y = np.arange(-40, 41), np.linspace(-30, 30, 600_001)
    density = np.exp(-(y**2) / (2 * (sigma**2 - smooth**2)))
    about = np.zeros(y.size)
    for k in whole:
        about += np.exp(-((k - y) ** 2) / (2 * smooth**2))
    shown = np.arange(-4, 5)
    found = np.array([np.trapezoid(density * np.exp(-((x - y) ** 2) / (2 * smooth**2)) / about, y) for x in shown])
    found /= np.trapezoid(density, y)
    off = float(np.abs(np.log(found / gaussian_pmf(sigma, 40)[36:45])).max())
    k = 2 * sum(math.exp(-2 * (math.pi * smooth * j) ** 2) for j in range(1, 9))
    assert off <= math.log((1 + k) / (1 - k)) + 1e-10
    if smooth >= 1:
        assert _factor(smooth) == pytest.approx(math.log((1 + k) / (1 - k)), rel=1e-6)


def test_the_factor_is_nothing_beside_delta_for_any_federation() -> None:
    assert _factor(SMOOTH) < 1e-33
    assert 10**6 * _factor(UNITS / math.sqrt(2)) < 1e-60
    _, slack = effective_multiplier(noise_share(1.0, 1.0, 1e-4, 10**6, 10**8), 10**6)
    assert slack * 10**6 < 1e-17  # 10^8 weights, 10^6 clients, 10^6 rounds


@pytest.mark.parametrize(("clients", "sigma", "moved"), [(1, 4.0, 4), (2, 4.0, 7), (4, 4.0, 5), (3, 5.5, 12)])
def test_the_sum_hides_a_client_as_the_gaussian_mechanism_of_that_multiplier(clients, sigma, moved) -> None:
    """Delta of sums that differ by `moved`, added up number by number, is at most that mechanism's, and near it."""
    share = NoiseShare("gaussian", 1.0, moved**2, sigma, 1)
    multiplier, slack = effective_multiplier(share, clients)
    found = sum_pmf(sigma, clients, round(16 * sigma * math.sqrt(clients)))
    for epsilon in (0.0, 0.25, 0.5, 1.0, 2.0):
        delta = np.maximum(found - math.exp(epsilon) * shifted(found, moved), 0).sum()
        assert delta <= gaussian_delta(epsilon - 2 * slack, 1 / multiplier) * math.exp(slack) + 1e-15
        assert delta >= 0.9 * gaussian_delta(epsilon, moved / (sigma * math.sqrt(clients)))


def test_so_it_does_where_two_numbers_move() -> None:
    share = NoiseShare("gaussian", 1.0, 25, 4.0, 2)
    multiplier, _ = effective_multiplier(share, 2)
    one = sum_pmf(4.0, 2, 70)
    with_, without = np.outer(shifted(one, 3), shifted(one, 4)), np.outer(one, one)
    for epsilon in (0.1, 0.5, 1.0):
        delta = np.maximum(with_ - math.exp(epsilon) * without, 0).sum()
        assert 0.9 * gaussian_delta(epsilon, 5 / (4 * math.sqrt(2))) <= delta <= gaussian_delta(epsilon, 1 / multiplier)


@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize(("clients", "sigma", "moved"), [(1, 4.0, 4), (4, 4.0, 7)])
def test_divergences_are_above_the_true_ones_and_near_them(order, clients, sigma, moved) -> None:
    reach = round(40 * sigma * math.sqrt(clients))
    numbers = np.arange(-reach, reach + 1)
    variance = clients * sigma**2
    shapes = {
        "gaussian": np.log(np.maximum(sum_pmf(sigma, clients, reach), 1e-300)),
        "skellam": skellam.logpmf(numbers, variance / 2, variance / 2),
    }
    for kind, logs in shapes.items():
        share = NoiseShare(kind, 1.0, moved**2, sigma, 1)  # type: ignore[arg-type]
        (bound,) = divergences(share, clients, [order])
        inner = slice(round(reach / 4), round(7 * reach / 4))
        terms = order * logs[inner] + (1 - order) * np.roll(logs, moved)[inner]
        true = float(np.logaddexp.reduce(terms[np.abs(logs[inner]) < 600])) / (order - 1)
        assert true <= bound * (1 + 1e-9)
        assert bound <= 1.6 * true  # by the L1 norm, which one number alone has at most


def test_skellam_costs_what_gaussian_noise_does_where_units_are_fine() -> None:
    orders = [2, 4, 16, 64]
    shares = [noise_share(3.0, 1.0, 1e-3, 99, 17_226, kind) for kind in ("gaussian", "skellam")]
    gaussian, other = (divergences(share, 99, orders) for share in shares)
    np.testing.assert_allclose(other, gaussian, rtol=1e-4)
    np.testing.assert_allclose(gaussian, np.array(orders) / (2 * 3.0**2), rtol=1e-6)
    assert divergences(shares[1], 99, [1.5])[0] == divergences(shares[1], 99, [2])[0]


def test_fewer_honest_clients_are_accounted_with_what_they_added() -> None:
    share = noise_share(3.0, 1.0, 1e-3, 99, 1000)
    assert effective_multiplier(share, 99)[0] == pytest.approx(3.0, rel=1e-6)
    assert effective_multiplier(share, 44)[0] == pytest.approx(3.0 * math.sqrt(44 / 99), rel=1e-6)
    assert effective_multiplier(share, 0) == (0.0, 0.0)
    for kind in ("gaussian", "skellam"):
        none = noise_share(3.0, 1.0, 1e-3, 99, 1000, kind)
        assert np.isinf(divergences(none, 0, [2, 3])).all()
    with pytest.raises(ValueError, match="account it by its divergences"):
        effective_multiplier(noise_share(3.0, 1.0, 1e-3, 99, 1000, "skellam"), 99)


# the plan


@pytest.mark.parametrize("protection", ["secagg", "bfv"])
@pytest.mark.parametrize("z", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("clients", [5, 60, 500])
def test_no_sum_wraps_at_the_edge_of_the_range_with_ten_deviations_of_noise(protection, z, clients) -> None:
    privacy = distributed(protection, noise_multiplier=z)
    plan = make_plan(privacy, clients)
    share = share_of(privacy, plan, 55_050)
    room = 2 ** (RING - 1) if protection == "secagg" else 2 ** (plan.lattice.field_bits - 1)  # type: ignore[union-attr]
    edge = math.floor(plan.grid.limit / plan.unit) + 1
    assert clients * edge + FAR * math.sqrt(clients) * share.deviation < room
    assert plan.clients == clients
    assert UNITS <= share.deviation <= 2 * FINEST
    assert math.sqrt(plan.honest) * share.deviation * plan.unit >= z
    assert 2 * math.exp(-(FAR**2) / 2) * 55_050 < 1e-9


def test_cohorts_that_vary_have_room_for_the_largest_and_noise_for_the_fewest() -> None:
    privacy = distributed()
    plan = make_plan(privacy, 160, 50)
    assert (plan.cohort, plan.honest, plan.least) == (160, 30, 40)
    assert plan.reference(50) == plan.reference(160) == 160
    with pytest.raises(ProtectionError, match="a cohort of 161 clients, where the numbers of 160 fit"):
        plan.reference(161)
    plan.check_share(1, 160)
    for announced in (50, 159, 161, 2**40):
        with pytest.raises(ProtectionError, match=f"announces {announced:,} shares of clients that weigh alike"):
            plan.check_share(1, announced)


def refused(said: str, privacy: Privacy, clients: int = 100) -> None:
    with pytest.raises(SettingsError, match=said):
        make_plan(privacy, clients)


@pytest.mark.parametrize(("protection", "clip"), [("secagg", 1e-6), ("bfv", 1e-3)])
def test_shares_under_four_units_are_refused_with_the_reason(protection, clip) -> None:
    refused(
        r"a share of \d+ clients' noise, would be rounded away, as .* and epsilon is proven for 4",
        distributed(protection, clip=clip),
    )


def test_plans_that_cannot_be_are_refused_with_the_reason() -> None:
    refused("privacy.protection = 'ckks' does not add whole numbers", distributed("ckks"))
    loud = distributed(noise_multiplier=3000.0)
    with pytest.raises(SettingsError, match="in which any model drowns"):
        share_of(loud, make_plan(loud, 10), 17_226)
    few = {"name": "secagg", "drop_outs": 0.5, "colluders": 0.5}
    refused("nobody's noise is left of 4 clients", distributed(protection=few), 4)
    privacy = distributed("bfv", noise_multiplier=3.0, clip=0.05)
    plan = make_plan(privacy, 100)
    with pytest.raises(
        SettingsError, match=r"an update of 5,000,000 numbers, rounded to multiples of .* times as long"
    ):
        share_of(privacy, plan, 5_000_000)
    assert share_of(privacy, plan, 1000).lengthening(0.05) < LONGEST


def test_a_plan_without_distributed_noise_is_as_it_was() -> None:
    e = Experiment.preset("digits").override({"privacy.protection": "secagg"})
    plan: Plan = make_plan(e.privacy, 5)
    assert (plan.honest, plan.least, plan.reference(1797)) == (0, 3, 1797)
