"""Gradient matching and deep leakage: what they find, and that they replay what clients do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from claims.slow_attacks import decibels, deep_leakage, fresh, matching, mean_of, observe
from helpers.pictures import TASK, made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.core.examples import Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.batches import orders
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.images import dlg
from fedveil.simulations.attacks.images import matching as room
from fedveil.simulations.attacks.images.dlg import DLG, IDLG
from fedveil.simulations.attacks.images.matching import MATCHING, replay, run_many, span, variation, work_of
from fedveil.simulations.attacks.lab.attack import Attack, launch, refusal
from fedveil.simulations.attacks.lab.observation import Known

TINY = Model(hidden=(16, 8))


def known_of(model: Model = TINY, network: nn.Module | None = None) -> Known:
    return Known(TASK, model, network or build(TASK, model, Stream(0)), auxiliary=made_up(200, 99))


def briefly(iterations: int) -> Attack:
    """Gradient matching with fewer iterations than 1,000, for their time."""
    return replace(MATCHING, run=partial(room.run, iterations=iterations))


def test_an_image_and_a_batch_are_found_in_the_update_of_a_fresh_network(real_data):
    assert matching(seed=0, batches=1, batch=1).min() >= 30
    assert (matching(seed=0, batches=1, batch=8) > 20).mean() >= 0.9


def test_images_are_found_through_five_local_steps_that_are_replayed(real_data):
    # 600 of the 1,000 iterations, for their time
    assert matching(seed=0, batches=1, batch=8, epochs=5, iterations=600).mean() >= 25


def test_deep_leakage_is_exact_through_sigmoid_and_finds_nothing_through_relu(real_data):
    assert deep_leakage(seed=0, batches=2, batch=1, activation="sigmoid").min() > 80
    assert deep_leakage(seed=0, batches=1, batch=1, activation="sigmoid", attack=IDLG).min() > 80
    assert deep_leakage(seed=0, batches=1, batch=1, activation="relu").mean() < 12  # the mean digit


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 7), epochs=st.integers(1, 4), batch=st.integers(1, 7), rate=st.sampled_from([0.01, 0.3]),
    loss=st.sampled_from(["cross_entropy", "squared_error"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_replayed_steps_on_the_true_images_change_weights_as_training_does(n, epochs, batch, rate, loss, seed):
    known, client = known_of(), made_up(n, seed)
    epochs = epochs if batch >= n else 1  # a later epoch's order is another
    training = Training(epochs=epochs, batch_size=batch, learning_rate=rate, loss=loss)
    before = fresh(known, seed)
    (seen,) = observe(known, before, [client], training, seed)
    work = work_of(seen)
    if len(work.batches) == 1:  # the length of a single step does not matter, and is not looked at
        work = replace(work, rate=rate)
    ordered = client.take(orders(n, training, [Stream(seed, 1, 0)])[0, 0])
    start = {name: tensor.unsqueeze(0).clone().requires_grad_() for name, tensor in before.items()}
    shares = torch.from_numpy(np.eye(3, dtype=np.float32)[ordered.labels])
    moved = replay(known.network, start, torch.from_numpy(ordered.features)[None], shares[None], work)
    for name, tensor in moved.items():
        np.testing.assert_allclose(-tensor[0].detach().numpy(), seen.update[name], atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_directions_searched_hold_all_images(n, epochs, seed):
    known, client = known_of(), made_up(n, seed)
    (seen,) = observe(known, fresh(known, seed), [client], Training(epochs=epochs, batch_size="full"), seed)
    base = span(seen, known)
    images = client.features.reshape(n, -1).astype(np.float64)
    heard = np.linalg.matrix_rank(seen.update["dense1.weight"], rtol=1e-3) == n  # the images moved units differently
    assert base is not None
    assert not heard or np.abs(images - images @ base.T @ base).max() < 0.02


def test_an_update_with_more_in_it_than_images_is_searched_pixel_by_pixel():
    known, client = known_of(), made_up(3, 0)
    (seen,) = observe(known, fresh(known, 0), [client], Training(batch_size="full"), 0)
    rng = np.random.default_rng(0)
    noisy = {name: array + rng.normal(0, 0.1 * array.std(), array.shape) for name, array in seen.update.items()}
    assert span(seen, known) is not None
    assert span(replace(seen, update=noisy), known) is None
    assert span(replace(seen, examples=16), known) is None  # as many as there are units


def test_without_a_dense_first_layer_every_pixel_is_searched():
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 3)]
    known, client = known_of(network=nn.Sequential(*layers)), made_up(1, 1)
    (seen,) = observe(known, weights.get(known.network), [client], Training(batch_size="full"), 1)
    assert span(seen, known) is None
    assert decibels(launch("matching", briefly(400), seen, known, Stream(1)), client).min() > 20


def test_many_observations_of_any_kind_give_each_its_own_images_again_and_again():
    known = known_of()
    before = fresh(known, 3)
    clients = [made_up(n, seed) for seed, n in enumerate([1, 3, 1, 1])]
    seen = [observe(known, before, [client], Training(batch_size="full"), 3)[0] for client in clients]
    streams = [Stream(3, 1, k) for k in range(len(clients))]
    found = run_many(seen, known, streams, iterations=150, together=2)
    assert [len(images) for images in found] == [1, 3, 1, 1]
    assert all(decibels(images, client).min() > 20 for images, client in zip(found, clients, strict=True))
    again = run_many(seen, known, streams, iterations=150, together=2)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_two_classes_with_one_logit_are_searched_too():
    task = Task("images", (1, 6, 6), ("ham", "spam"))
    layers = [nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid(), nn.Linear(16, 1)]
    known = Known(task, Model(activation="sigmoid"), nn.Sequential(*layers))
    client = made_up(1, 4, task)
    (seen,) = observe(known, weights.get(known.network), [client], Training(batch_size="full"), 4)
    for attack in (briefly(300), DLG, IDLG):
        assert decibels(launch("it", attack, seen, known, Stream(4)), client).min() > 20
    assert known.network.training
    for name, parameter in known.network.named_parameters():
        assert (parameter.detach().numpy() == seen.before[name]).all()
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("clients", [1, 3])
def test_the_gradient_behind_an_update_is_that_of_autograd(clients):
    known, parts = known_of(), [made_up(4, seed) for seed in range(clients)]
    before = fresh(known, 0)
    training = Training(batch_size="full", learning_rate=0.05)
    seen = observe(known, before, parts, training, 0)
    found = dlg.gradient(mean_of(seen) if clients > 1 else seen[0])
    weights.load(known.network, before)
    logits = known.network(torch.from_numpy(np.concatenate([part.features for part in parts])))
    value = nn.functional.cross_entropy(logits, torch.from_numpy(np.concatenate([part.labels for part in parts])))
    value.backward()
    for name, parameter in known.network.named_parameters():
        np.testing.assert_allclose(found[name], parameter.grad, atol=2e-6)


def test_total_variation_is_the_mean_difference_of_neighbours():
    image = np.random.default_rng(0).random((1, 1, 1, 4, 5))
    down = [abs(image[0, 0, 0, i + 1, j] - image[0, 0, 0, i, j]) for i in range(3) for j in range(5)]
    right = [abs(image[0, 0, 0, i, j + 1] - image[0, 0, 0, i, j]) for i in range(4) for j in range(4)]
    assert variation(torch.from_numpy(image)).item() == pytest.approx(np.mean(down) + np.mean(right))


@pytest.mark.parametrize(
    ("training", "n", "said"),
    [
        (Training(optimizer="adam"), 1, "adam"),
        (Training(batch_size=64), 64, "64 images at once"),
        (Training(epochs=50), 4, "50 local steps"),
        (Training(epochs=3, momentum=0.9), 4, "momentum"),
        (Training(epochs=2, batch_size=2), 4, "order"),
        (None, 4, "not known"),
        (Training(batch_size="full", epochs=5), 4, None),
    ],
    ids=["adam", "many images", "many steps", "momentum", "order", "unknown training", "fine"],
)
def test_what_spoils_a_search_is_said_before_it(training, n, said):
    known, client = known_of(), made_up(n, 0)
    (seen,) = observe(known, fresh(known, 0), [client], training or Training(), 0)
    warning = MATCHING.warn(replace(seen, training=training), known)
    assert warning is None if said is None else said in warning


def test_a_search_is_refused_without_what_it_needs():
    known, client = known_of(), made_up(1, 0)
    (seen,) = observe(known, fresh(known, 0), [client], Training(), 0)
    assert "how many examples" in refusal(MATCHING, replace(seen, examples=None), known)
    assert "how clients train" in refusal(DLG, replace(seen, training=None), known)
    assert "sms-lstm" not in refusal(MATCHING, seen, replace(known, task=Task("text", (6,), ("ham", "spam"), 9)))
    assert "ReLU" in DLG.warn(seen, known)
    assert DLG.warn(seen, known_of(Model(**TINY.dump() | {"activation": "tanh"}))) is None
    assert "dropout" in MATCHING.warn(seen, known_of(Model(**TINY.dump() | {"dropout": 0.5})))
