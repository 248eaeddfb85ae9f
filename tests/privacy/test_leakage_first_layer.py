"""Images read from a dense first layer: against layers whose gradients are made by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.leakage.first_layer import ALIKE, find, one, ratios, several

UNITS, INPUTS = 24, 50


def pictures(rng: np.random.Generator, n: int) -> np.ndarray:
    """Images that are black in places, float64 [n, INPUTS]."""
    return np.clip(rng.normal(0, 0.6, (n, INPUTS)), 0, 1)


@given(st.integers(0, 2**32), st.floats(-10, 10).filter(lambda rate: abs(rate) > 1e-6))
def test_one_example_is_read_exactly_and_the_learning_rate_cancels(seed, rate):
    rng = np.random.default_rng(seed)
    (image,), slope = pictures(rng, 1), rng.normal(size=UNITS)
    np.testing.assert_allclose(one(rate * np.outer(slope, image), rate * slope), image, atol=1e-12)


def test_nothing_is_read_where_nothing_reached_the_layer():
    weight, bias = np.zeros((UNITS, INPUTS)), np.zeros(UNITS)
    assert not one(weight, bias).any()
    assert len(ratios(weight, bias)) == len(several(weight, bias, 3)) == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_images_that_are_alone_in_units_come_before_mixtures_each_once(seed, n):
    rng = np.random.default_rng(seed)
    images = pictures(rng, n)
    slopes = rng.normal(size=(UNITS, n))
    slopes[: 2 * n] = 0
    for k in range(n):
        slopes[2 * k : 2 * k + 2, k] = rng.uniform(0.5, 1, 2)  # two units of its own; the other units see all images
    order = rng.permutation(UNITS)
    found = several((slopes @ images)[order], slopes.sum(axis=1)[order], n)
    assert len(found) == n
    distances = np.sqrt(((found[:, None] - images[None]) ** 2).mean(axis=2))  # [found, images]
    assert (distances.min(axis=0) < ALIKE).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_there_are_never_more_than_asked_for_and_all_are_images(seed, n):
    rng = np.random.default_rng(seed)
    found = several(rng.normal(size=(UNITS, INPUTS)), rng.normal(size=UNITS), n)
    assert len(found) <= n
    assert ((found >= 0) & (found <= 1)).all()


def test_only_a_dense_layer_on_all_inputs_that_comes_first_is_found():
    weight, bias, image = np.zeros((4, 9)), np.zeros(4), np.zeros((6, 1, 3, 3))
    assert find({"a.weight": weight, "a.bias": bias, "b": bias}, 9) == ("a.weight", "a.bias")
    assert find({"a.weight": weight, "b.weight": np.zeros((3, 4))}, 9) == ("a.weight", None)
    assert find({"a.weight": weight}, 9) == ("a.weight", None)
    assert find({"a.weight": weight, "a.bias": bias}, 8) is None
    assert find({"convolution": image, "a.weight": weight, "a.bias": bias}, 9) is None
    assert find({}, 9) is None
