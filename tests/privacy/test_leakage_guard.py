"""What a client is told of its own update, before it sends it."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.privacy.leakage.guard import Revealed, reveals

TEXT = Task("text", (20,), ("ham", "spam"), vocabulary_size=300)
IMAGES = Task("images", (1, 8, 8), tuple("abcde"))
LSTM = Model(name="lstm", embedding=16, units=16)
STEP = Training(batch_size="full", learning_rate=0.1)


def texts(n: int) -> Examples:
    """Texts of 14 distinct words each, of which no two share one."""
    ids = np.zeros((n, 20), np.int32)
    ids[:, :14] = np.random.default_rng(0).permutation(np.arange(2, 300))[: 14 * n].reshape(n, 14)
    return Examples(ids, np.arange(n) % 2)


def images(labels: list[int]) -> Examples:
    pixels = np.clip(np.random.default_rng(1).normal(0, 0.6, (len(labels), 1, 8, 8)), 0, 1)
    return Examples(pixels.astype(np.float32), np.array(labels))


def told(task: Task, network: nn.Module, examples: Examples, training: Training = STEP) -> Revealed:
    before = weights.get(network)
    after = train_clients(
        network, before, [examples], training, training.learning_rate, [Stream(0)], classes=len(task.classes)
    ).parameters
    return reveals(
        weights.to_numpy(before), {name: tensor[0].numpy() for name, tensor in after.items()}, examples, task
    )


def test_the_words_and_the_label_of_a_text_are_told():
    found = told(TEXT, build(TEXT, LSTM, Stream(0)), texts(1))
    assert found == Revealed(words=14, of_words=14, labels=1, of_labels=1)
    assert str(found) == "this update reveals 14 of 14 words, and the label"


def test_the_words_of_all_texts_are_told_and_no_label_of_a_client_that_has_all_classes():
    assert told(TEXT, build(TEXT, LSTM, Stream(0)), texts(4)) == Revealed(words=56, of_words=56, of_labels=2)


def test_a_single_image_is_told_with_its_quality():
    found = told(IMAGES, build(IMAGES, Model(), Stream(0)), images([3]))
    assert (found.images, found.of_images, found.labels) == (1, 1, 1)
    assert found.decibels is not None
    assert str(found) == f"this update reveals the image exactly ({found.decibels:.0f} dB), and the label"
    assert found.decibels > 100


def test_of_several_images_those_that_are_visible_are_counted():
    found = told(IMAGES, build(IMAGES, Model(), Stream(0)), images([3, 3, 1]))
    assert 1 <= found.images <= found.of_images == 3
    assert f"{found.images} of 3 images" in str(found)
    assert f"{found.labels} of 2 classes" in str(found)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_steps_that_are_no_gradients_reveal_no_image(optimizer):
    training = Training(batch_size="full", optimizer=optimizer, learning_rate=0.01)
    found = told(IMAGES, build(IMAGES, Model(), Stream(0)), images([3]), training)
    assert (found.images, found.decibels) == (0, None)


def test_an_update_that_changes_nothing_reveals_nothing():
    before = weights.to_numpy(weights.get(build(TEXT, LSTM, Stream(0))))
    found = reveals(before, before, texts(1), TEXT)
    assert not found.anything
    assert str(found) == "this update reveals nothing to the attacks that take milliseconds"


def test_noise_on_the_update_hides_words_and_image():
    rng = np.random.default_rng(2)
    for task, model, examples in ((TEXT, LSTM, texts(1)), (IMAGES, Model(), images([3]))):
        before = weights.to_numpy(weights.get(build(task, model, Stream(0))))
        after = {name: (w + rng.normal(size=w.shape)).astype(np.float32) for name, w in before.items()}
        found = reveals(before, after, examples, task)
        assert (found.words, found.images) == (0, 0)


def test_a_network_that_starts_with_a_convolution_has_no_image_to_read():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    assert told(IMAGES, network, images([3])) == Revealed(labels=1, of_labels=1)
