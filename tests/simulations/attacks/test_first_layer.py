"""Images by division: exact for one, some of a few, and what spoils it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fast_attacks import MLP, STEP, pictures, together
from claims.slow_attacks import decibels, fresh, mean_of, observe
from helpers.pictures import TASK, made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.images.first_layer import FIRST_LAYER, kept_share
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known


def known_of(model: Model = MLP, network: nn.Module | None = None) -> Known:
    return Known(TASK, model, network or build(TASK, model, Stream(0)))


SGD = {
    "step": {}, "small": {"learning_rate": 0.01}, "epochs": {"epochs": 5}, "momentum": {"epochs": 5, "momentum": 0.9},
    "decay": {"weight_decay": 1e-4}, "nesterov": {"epochs": 5, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("change", SGD.values(), ids=SGD)
def test_one_image_is_read_exactly_from_any_steps_of_sgd(real_data, change):
    assert pictures(FIRST_LAYER, STEP.model_copy(update=change), 0, 20).min() > 100


def test_one_image_is_read_from_a_trained_model(real_data):
    found = pictures(FIRST_LAYER, STEP, 0, 20, learnt=True)
    assert np.median(found) > 100
    assert found.min() > 40


def test_at_least_half_of_eight_images_are_read(real_data):
    assert (pictures(FIRST_LAYER, STEP, 0, 8, 8) > 30).mean() >= 0.5


def test_at_least_half_of_eight_clients_images_are_read_from_their_mean(real_data):
    assert (together(FIRST_LAYER, 0, 6, 8) > 60).mean() >= 0.5


def test_adam_leaves_a_silhouette_at_best_and_it_is_said_beforehand(real_data):
    adam = STEP.model_copy(update={"optimizer": "adam", "learning_rate": 1e-3})
    assert np.median(pictures(FIRST_LAYER, adam, 0, 8)) < 20
    known = known_of()
    (seen,) = observe(known, fresh(known, 0), [made_up(1)], adam, 0)
    assert "silhouette" in (FIRST_LAYER.warn(seen, known) or "")
    assert FIRST_LAYER.warn(replace(seen, training=STEP), known) is None
    assert "20 images in 64 units" in (FIRST_LAYER.warn(replace(seen, training=STEP, examples=20), known) or "")


@given(
    st.floats(0, 0.3), st.floats(1e-3, 0.5), st.sampled_from([0.0, 0.5, 0.9]), st.booleans(), st.integers(1, 6)
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_what_decay_leaves_of_a_weight_is_what_training_leaves_where_there_is_no_gradient(
    decay, rate, momentum, nesterov, epochs
):
    training = Training(
        epochs=epochs, batch_size="full", learning_rate=rate, momentum=momentum, nesterov=nesterov and momentum > 0,
        weight_decay=decay,
    )  # fmt: skip
    known, client = known_of(), made_up(1)
    black = Examples(np.zeros_like(client.features), client.labels)  # no gradient in the first layer's weight
    (seen,) = observe(known, fresh(known, 0), [black], training, 0)
    before = seen.before["dense1.weight"]
    np.testing.assert_allclose(
        before + seen.update["dense1.weight"], kept_share(training, epochs) * before, rtol=1e-5, atol=1e-7
    )


def test_the_share_of_decay_is_each_clients_own_in_a_mean():
    known, training = known_of(), STEP.model_copy(update={"weight_decay": 0.5, "epochs": 3, "batch_size": 1})
    seen = observe(known, fresh(known, 0), [made_up(1, seed) for seed in range(3)], training, 0)
    alone = [decibels(launch("f", FIRST_LAYER, each, known, Stream(0)), made_up(1, k)) for k, each in enumerate(seen)]
    assert np.min(alone) > 100
    truth = Examples(np.concatenate([made_up(1, k).features for k in range(3)]), np.zeros(3, np.int64))
    found = decibels(launch("f", FIRST_LAYER, mean_of(seen), known, Stream(0)), truth)
    assert found.max() > 60


def test_it_is_refused_where_no_dense_layer_with_a_bias_sees_the_pixels():
    known = known_of()
    (seen,) = observe(known, fresh(known, 0), [made_up(2)], STEP, 0)
    assert refusal(FIRST_LAYER, seen, known) is None
    assert "how many examples" in (refusal(FIRST_LAYER, replace(seen, examples=None), known) or "")
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    assert "does not start with a dense layer" in (refusal(FIRST_LAYER, seen, known_of(network=convolution)) or "")
    unbiased = nn.Sequential(nn.Flatten(), nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    assert "has no bias" in (refusal(FIRST_LAYER, seen, known_of(network=unbiased)) or "")
    text = Task("text", (6,), ("ham", "spam"), 50)
    assert "the data are text" in (FIRST_LAYER.suits(Known(text, MLP, build(text, MLP, Stream(0)))) or "")
