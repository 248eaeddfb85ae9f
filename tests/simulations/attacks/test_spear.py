"""Whole batches, exactly, from low rank and ReLU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fast_attacks import MLP, STEP, pictures, together
from claims.slow_attacks import fresh, observe
from helpers.pictures import TASK, made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.images.spear import SPEAR, Layer, batch
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known


@pytest.mark.parametrize(("size", "share"), [(4, 0.8), (8, 0.8)])
def test_batches_on_a_fresh_model_are_found_exactly(real_data, size, share):
    assert (pictures(SPEAR, STEP, 0, 10, size) > 60).mean() >= share


def test_batches_on_a_trained_model_are_found_mostly(real_data):
    assert (pictures(SPEAR, STEP, 0, 6, 4, learnt=True) > 60).mean() >= 0.6


def test_the_images_of_eight_clients_are_found_in_their_mean(real_data):
    assert (together(SPEAR, 0, 4, 8) > 60).mean() >= 0.8


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 7), st.booleans())
def test_a_layer_made_by_hand_gives_its_batch_back_in_any_order(seed, n, rounded):
    rng = np.random.default_rng(seed)
    images, start = np.clip(rng.normal(0, 0.6, (n, 50)), 0, 1), rng.normal(size=(48, 50))
    start_bias = -start @ images.mean(axis=0)  # so that each image reaches about half of the units
    on = start @ images.T + start_bias[:, None] > 0
    slopes = rng.normal(size=(48, n)) * on
    weight, bias = -0.1 * slopes @ images, -0.1 * slopes.sum(axis=1)
    if rounded:
        weight = (start.astype(np.float32) + weight).astype(np.float32) - start.astype(np.float32).astype(np.float64)
    found = batch(Layer(weight, bias, start, start_bias), n, np.random.default_rng(0))
    assert found is not None
    errors = np.abs(found[:, None] - images[None]).max(axis=2)
    assert sorted(errors.argmin(axis=0)) == list(range(n))
    assert errors.min(axis=0).max() < (1e-2 if rounded else 1e-6)


def test_what_has_no_low_rank_is_given_up_and_divided():
    rng = np.random.default_rng(0)
    noise = Layer(rng.normal(size=(8, 36)), rng.normal(size=8), rng.normal(size=(8, 36)), np.zeros(8))
    assert batch(noise, 9, rng) is None
    known = Known(TASK, MLP, build(TASK, MLP, Stream(0)))
    (seen,) = observe(known, fresh(known, 0), [made_up(70)], STEP, 0)
    found = launch("spear", SPEAR, seen, known, Stream(0))
    assert 0 < len(found) <= 70
    assert ((found >= 0) & (found <= 1)).all()


def test_the_same_stream_finds_the_same_images():
    known = Known(TASK, MLP, build(TASK, MLP, Stream(0)))
    (seen,) = observe(known, fresh(known, 0), [made_up(4)], STEP, 0)
    once, again = (launch("spear", SPEAR, seen, known, Stream(5)) for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_it_is_refused_without_relu_behind_the_first_layer():
    known = Known(TASK, MLP, build(TASK, MLP, Stream(0)))
    (seen,) = observe(known, fresh(known, 0), [made_up(4)], STEP, 0)
    assert refusal(SPEAR, seen, known) is None
    for model, behind in ((Model(activation="sigmoid"), "Sigmoid"), (Model(normalization="layer"), "LayerNorm")):
        assert f"there is {behind}" in (SPEAR.suits(Known(TASK, model, build(TASK, model, Stream(0)))) or "")
    alone = Known(TASK, MLP, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    assert "there is nothing" in (SPEAR.suits(alone) or "")
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    assert "does not start with a dense layer" in (SPEAR.suits(Known(TASK, MLP, convolution)) or "")


def test_large_batches_and_adam_are_said_beforehand_to_be_hopeless():
    known = Known(TASK, MLP, build(TASK, MLP, Stream(0)))
    (seen,) = observe(known, fresh(known, 0), [made_up(4)], STEP, 0)
    assert SPEAR.warn(seen, known) is None
    assert "double" in (SPEAR.warn(replace(seen, examples=20), known) or "")
    assert "no low rank" in (SPEAR.warn(replace(seen, examples=64), known) or "")
    adam = STEP.model_copy(update={"optimizer": "adam"})
    assert "no gradients" in (SPEAR.warn(replace(seen, training=adam), known) or "")
