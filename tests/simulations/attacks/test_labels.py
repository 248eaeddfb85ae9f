"""Labels and how often each occurs, from the update of the last bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fast_attacks import STEP, labels, mean
from claims.slow_attacks import fresh, observe
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known
from fedveil.simulations.attacks.labels import LABELS, step_length

TASK = Task("images", (1, 6, 6), ("a", "b", "c"))
TEXT = Task("text", (6,), ("ham", "spam"), vocabulary_size=50)
BAG = Model(name="bag", embedding=1, pooling="sum")


def made_up(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(rng.random((n, 1, 6, 6), np.float32), rng.integers(0, 3, n))


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("change", [{}, {"epochs": 5}, {"optimizer": "adam"}], ids=["step", "epochs", "adam"])
def test_the_label_of_one_image_is_always_read(real_data, learnt, change):
    assert mean(labels(STEP.model_copy(update=change), 0, 20, 1, learnt), "exact") == 1


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_labels_of_a_batch_are_counted_exactly_on_a_fresh_model_with_examples_like_the_clients(real_data, batch):
    assert mean(labels(STEP, 0, 10, batch), "exact") == 1


def test_without_such_examples_counts_are_rough(real_data):
    scores = labels(STEP, 0, 10, 32, like=False)
    assert mean(scores, "exact") < 0.5
    assert mean(scores, "accuracy") > 0.8


def test_on_a_trained_model_counts_are_hardly_better_than_chance(real_data):
    """Guessing that all classes are equally frequent gives 0.56 for 8 images (and 0.79 for 32)."""
    assert 0.5 < mean(labels(STEP, 0, 20, 8, learnt=True), "accuracy") < 0.8


@settings(max_examples=20, deadline=None)
@given(
    st.floats(1e-3, 1.0), st.sampled_from([0.0, 0.5, 0.9]), st.booleans(), st.integers(1, 6), st.integers(0, 99)
)  # fmt: skip
def test_a_gradient_that_stays_moves_a_weight_by_the_step_length(rate, momentum, nesterov, steps, seed):
    training = Training(learning_rate=rate, momentum=momentum, nesterov=nesterov and momentum > 0)
    weight, velocity = 0.0, 0.0
    for step in range(steps):  # as torch.optim.SGD documents it
        velocity = momentum * velocity + 1.0 if step else 1.0
        weight -= rate * (1.0 + momentum * velocity if training.nesterov else velocity)
    assert step_length(training, steps) == pytest.approx(-weight)


def test_counts_are_whole_and_as_many_as_examples_for_any_update():
    known = Known(TASK, Model(), build(TASK, Model(), Stream(0)), auxiliary=made_up(60, 9))
    rng = np.random.default_rng(0)
    (seen,) = observe(known, fresh(known, 0), [made_up(7)], STEP, 0)
    for training in (STEP, None):
        for scale in (0.0, 1e-6, 1.0, 100.0):
            noise = {name: scale * rng.normal(size=change.shape) for name, change in seen.update.items()}
            found = launch("l", LABELS, replace(seen, update=noise, training=training), known, Stream(0))
            assert found.sum() == 7
            assert found.min() >= 0


def test_a_class_that_does_not_occur_gives_the_learning_rate_away():
    known = Known(TASK, Model(), build(TASK, Model(), Stream(0)), auxiliary=made_up(300, 9))
    client = made_up(8)
    client = Examples(client.features, np.array([0, 0, 0, 2, 2, 0, 0, 2]))
    (seen,) = observe(known, fresh(known, 0), [client], STEP, 0)
    found = launch("l", LABELS, replace(seen, training=None), known, Stream(0))
    assert found.tolist() == [5, 0, 3]


def test_texts_of_two_classes_are_counted_too():
    rng = np.random.default_rng(0)
    texts = [Examples(rng.integers(1, 50, (n, 6)).astype(np.int32), rng.integers(0, 2, n)) for n in (6, 300)]
    model = Model(name="lstm", embedding=8, units=8)
    known = Known(TEXT, model, build(TEXT, model, Stream(0)), auxiliary=texts[1])
    (seen,) = observe(known, fresh(known, 0), texts[:1], STEP, 0)
    wanted = np.bincount(texts[0].labels, minlength=2)
    assert launch("l", LABELS, seen, known, Stream(0)).tolist() == wanted.tolist()
    rough = launch("l", LABELS, seen, replace(known, auxiliary=None), Stream(0))
    assert np.abs(rough - wanted).max() <= 1


def test_it_is_refused_where_no_bias_tells_classes_apart():
    known = Known(TEXT, BAG, build(TEXT, BAG, Stream(0)))
    assert "no bias of an output layer" in (LABELS.suits(known) or "")
    images = Known(TASK, Model(), build(TASK, Model(), Stream(0)))
    (seen,) = observe(images, fresh(images, 0), [made_up(2)], STEP, 0)
    assert refusal(LABELS, seen, images) is None
    assert "how many examples" in (refusal(LABELS, replace(seen, examples=None), images) or "")


def test_what_counts_need_is_said_beforehand():
    known = Known(TASK, Model(), build(TASK, Model(), Stream(0)), auxiliary=made_up(30))
    (seen,) = observe(known, fresh(known, 0), [made_up(4)], STEP, 0)
    said = {
        "trained one": LABELS.warn(seen, known),
        "asked about noise": LABELS.warn(seen, replace(known, auxiliary=None)),
        "is not known": LABELS.warn(replace(seen, training=None), known),
        "cannot be counted": LABELS.warn(replace(seen, training=Training(optimizer="adam")), known),
        "cross entropy": LABELS.warn(replace(seen, training=Training(loss="squared_error")), known),
    }
    for part, warning in said.items():
        assert part in (warning or "")
    assert LABELS.warn(replace(seen, examples=1), known) is None
