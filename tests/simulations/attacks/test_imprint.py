"""The imprint attack: what a malicious server reads from a first layer it made up, and what spoils it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims import sums
from claims.slow_attacks import decibels, fresh, imprint, observe
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import Experiment
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.images.imprint import IMPRINT, craft
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.lab import attack
from fedveil.simulations.attacks.lab.observation import Known

TASK = Task("images", (1, 8, 8), ("a", "b", "c"))
ONE_STEP = Training(batch_size="full", learning_rate=0.1)


def made_up(seed: int, n: int) -> Examples:
    """Images of any brightness."""
    rng = np.random.default_rng(seed)
    return Examples((rng.random((n, 1, 1, 1)) * rng.random((n, *TASK.shape))).astype(np.float32), rng.integers(0, 3, n))


def known_of(**settings) -> Known:
    model = Model(**{"hidden": (64, 16), **settings})
    return Known(TASK, model, build(TASK, model, Stream(0)), auxiliary=made_up(99, 500))


def sent_to(known: Known, seed: int) -> dict:
    return weights.from_numpy(craft(weights.to_numpy(fresh(known, seed)), known, Stream(seed)))


def test_most_images_of_a_batch_are_read_exactly_with_256_bins(real_data):
    assert (imprint(seed=0, batches=4) > 30).mean() >= 0.7
    assert (imprint(seed=0, batches=4, hidden=(256,)) > 30).mean() >= 0.7  # the second layer is the last


def test_the_sum_under_secure_aggregation_is_no_protection_from_a_server_that_makes_up_the_model():
    """One model for all, so that masks cancel, and the unmasked sum; encryption leaves the server nothing to read."""
    settings = {
        "model.hidden": [256, 64], "model.activation": "relu", "model.dropout": 0.0, "training.batch_size": "full",
        "training.epochs": 1, "training.optimizer": "sgd", "data.client_examples": 4, "privacy.protection": "secagg",
    }  # fmt: skip
    experiment = Experiment.preset("digits").override(settings)
    asked = frozenset({"training.batch_size", "data.client_examples"})
    found = attack("imprint", experiment, trials=2, asked=asked)
    assert (found.observer, found.refused) == ("malicious-aggregate", None)
    assert len(found.shown[0].trial.truth.examples) == 8 * 4
    assert found.mean()["above_30"] > 0.4
    for protection, observer in (("ckks", None), ("ckks", "malicious-aggregate"), ("secagg", "malicious-server")):
        hidden = experiment.override({"privacy.protection": protection})
        refused = attack("imprint", hidden, trials=1, asked=asked, observer=observer)
        assert refused.refused is not None
        assert refused.refused.endswith("saw protected bytes and no weights")


def test_most_images_of_eight_clients_are_read_from_their_sum(real_data):
    found = sums.imprint(seed=0, trials=1)
    assert found.refused is None
    assert found.mean()["above_30"] >= 0.6


def test_a_small_learning_rate_hides_nothing_and_local_steps_hide_some(real_data):
    slow = Training(batch_size="full", learning_rate=0.01)
    assert (imprint(seed=1, batches=4, training=slow) > 30).mean() >= 0.7
    several = (imprint(seed=1, batches=4, training=slow.model_copy(update={"epochs": 5})) > 30).mean()
    assert 0.3 < several < 0.7


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 24), seed=st.integers(0, 999), activation=st.sampled_from(["relu", "leaky_relu", "prelu"]))
def test_an_image_that_is_alone_between_two_thresholds_is_read(n, seed, activation):
    known, client = known_of(activation=activation), made_up(seed, n)
    sent = sent_to(known, seed)
    (seen,) = observe(known, sent, [client], ONE_STEP, seed)
    edges = -sent["dense1.bias"].numpy() / sent["dense1.weight"].sum(1).numpy()
    bins = np.searchsorted(edges, client.features.reshape(n, -1).mean(1)) - 1
    clear = (
        np.abs(edges[:, None] - client.features.reshape(n, -1).mean(1)).min(0) > 1e-4
    )  # nearer, float32 loses digits
    clear &= bins > 0  # an image that is as good as black moves next to nothing
    alone = clear & (np.bincount(bins, minlength=64)[bins] == 1)
    found = launch("imprint", IMPRINT, replace(seen, crafted=True), known, Stream(seed))
    assert len(found) <= n
    assert (decibels(found, client)[alone] > 20).all()


def test_all_bins_feel_an_image_alike_and_no_unit_of_the_second_layer_is_off():
    known, client = known_of(), made_up(1, 1)
    sent = sent_to(known, 1)
    (seen,) = observe(known, sent, [client], ONE_STEP, 1)
    passed = seen.update["dense1.bias"][seen.update["dense1.bias"] != 0]
    assert len(passed) > 1
    np.testing.assert_allclose(passed, passed[0], rtol=1e-3)
    assert (np.abs(seen.update["dense2.bias"]) > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "sigmoid"}, "ReLU"),
        ({"normalization": "layer"}, "normalization"),
        ({"dropout": 0.5}, "dropout"),
        ({"hidden": (16, 16)}, "16 in the first layer"),
        ({"hidden": ()}, "two dense layers"),
    ],
    ids=["sigmoid", "layer norm", "dropout", "few units", "one layer"],
)
def test_a_network_that_cannot_sort_is_refused_with_the_setting_to_change(settings, said):
    known = known_of(**settings)
    assert said in IMPRINT.suits(known)
    with pytest.raises(SettingsError, match=said):
        craft(weights.to_numpy(fresh(known, 0)), known, Stream(0))


def test_it_is_refused_on_a_model_that_the_server_did_not_make_up_and_without_images_to_place_bins():
    known, client = known_of(), made_up(0, 4)
    (seen,) = observe(known, fresh(known, 0), [client], ONE_STEP, 0)
    assert "did not make the model" in refusal(IMPRINT, seen, known)
    with pytest.raises(SettingsError, match="place its bins"):
        craft(seen.before, replace(known, auxiliary=None), Stream(0))


@pytest.mark.parametrize(
    ("training", "said"),
    [(ONE_STEP, None), (Training(epochs=3, batch_size=2), "6 local steps"), (Training(optimizer="adam"), "adam"), (None, "move")],
    ids=["one step", "steps", "adam", "unknown"],
)  # fmt: skip
def test_what_spoils_it_is_said_before(training, said):
    known, client = known_of(), made_up(0, 4)
    (seen,) = observe(known, fresh(known, 0), [client], ONE_STEP, 0)
    warning = IMPRINT.warn(replace(seen, training=training), known)
    assert warning is None if said is None else said in warning
