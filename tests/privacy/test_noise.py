"""Clipping and noise: the norm of a whole update, the bound, and numbers that are normal, wherever they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kstest
from scipy.stats import norm as normal

from fedveil.core.randomness import Stream
from fedveil.privacy.dp.noise import add_noise, clip, clip_rows, norm, secret_normal

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
updates = st.fixed_dictionaries({
    "weight": arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=numbers),
    "bias": arrays(np.float32, st.integers(1, 4), elements=numbers),
})  # fmt: skip


def slow_norm(update: dict[str, np.ndarray]) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for value in update.values() for x in value.reshape(-1)))


@given(updates)
def test_the_norm_is_of_all_tensors_as_one_vector(update) -> None:
    assert norm(update) == pytest.approx(slow_norm(update), rel=1e-12)


def test_the_norm_is_computed_in_float64() -> None:
    update = {"a": np.full(1, 4096, np.float32), "b": np.full(1_000_000, 0.5, np.float32)}  # float32 loses these
    assert norm(update) == pytest.approx(math.sqrt(4096**2 + 250_000), rel=1e-14)
    assert norm({"a": np.full(3, 1e30, np.float32)}) == pytest.approx(1e30 * math.sqrt(3), rel=1e-6)


@given(updates, st.floats(1e-6, 1e6))
def test_a_clipped_update_is_no_longer_than_the_bound_and_points_the_same_way(update, bound) -> None:
    clipped, length = clip(update, bound), norm(update)
    assert norm(clipped) <= bound * (1 + 1e-12)
    factor = min(1.0, bound / length) if length else 1.0
    for name, value in update.items():
        np.testing.assert_allclose(clipped[name], value.astype(np.float64) * factor, rtol=1e-12)


@given(updates)
def test_an_update_within_the_bound_stays_as_it_is(update) -> None:
    for name, value in clip(update, 2.0**110).items():
        np.testing.assert_array_equal(value, update[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_lets_nothing_through(bad) -> None:
    clipped = clip({"a": np.array([1.0, bad]), "b": np.ones(3)}, 1.0)
    assert not any(value.any() for value in clipped.values())


@given(st.integers(0, 2**32), st.floats(0, 100))
def test_noise_of_a_stream_is_the_streams_numbers_in_the_tensors_order(seed, deviation) -> None:
    update = {"weight": np.ones((3, 2)), "bias": np.full(4, 2.0)}
    noisy = add_noise(update, deviation, Stream(seed, 2, 7).generator("noise").standard_normal)
    drawn = Stream(seed, 2, 7).generator("noise").standard_normal(10)
    np.testing.assert_array_equal(noisy["weight"], 1 + deviation * drawn[:6].reshape(3, 2))
    np.testing.assert_array_equal(noisy["bias"], 2 + deviation * drawn[6:])


@given(st.integers(0, 1001))
def test_secret_numbers_are_as_many_as_asked_for_and_never_the_same(size) -> None:
    first, second = secret_normal(size), secret_normal(size)
    assert first.shape == (size,)
    assert np.isfinite(first).all()
    assert not size or (first != second).all()


def test_secret_numbers_are_normal_and_of_one_another_independent() -> None:
    """A right generator fails this once in about 10^8 runs; one whose deviation is off by 2 % fails it always."""
    drawn = secret_normal(400_000)
    assert kstest(drawn, normal.cdf).pvalue > 1e-9
    halves = drawn.reshape(2, -1)  # the two numbers that come of one pair of uniform ones
    bound = 6 / math.sqrt(halves.shape[1])
    assert abs(np.corrcoef(*halves)[0, 1]) < bound
    assert abs(np.corrcoef(*(halves**2))[0, 1]) < bound
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < bound
    assert abs(np.mean(np.square(drawn)) - 1) < 6 * math.sqrt(2 / drawn.size)
    assert abs(np.mean(np.abs(drawn) > 3) - 2 * normal.sf(3)) < 6 * math.sqrt(2 * normal.sf(3) / drawn.size)


@given(st.integers(1, 6), st.sampled_from([1e-3, 0.3, 1e6]), st.integers(0, 5), st.booleans())
def test_rows_of_many_clients_are_clipped_as_each_alone_is(clients, bound, seed, spoilt) -> None:
    random = np.random.default_rng(seed)
    model = {"w": random.normal(size=(3, 2)).astype(np.float32), "b": random.normal(size=4).astype(np.float32)}
    rows = {
        name: (value + 0.1 * random.normal(size=(clients, *value.shape))).astype(np.float32)
        for name, value in model.items()
    }
    if spoilt:
        rows["b"][0, 1] = np.nan
    updates = [
        {name: np.subtract(rows[name][k], model[name], dtype=np.float64) for name in model} for k in range(clients)
    ]
    lengths = clip_rows(model, rows, bound)
    for k, update in enumerate(updates):
        assert lengths[k] == pytest.approx(norm(update), nan_ok=True)
        for name, value in clip(update, bound).items():
            np.testing.assert_allclose(rows[name][k], model[name] + value, rtol=1e-6, atol=1e-7)
