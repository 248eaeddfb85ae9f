"""Local training against slow, obvious loops: one in NumPy, one in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers.drawing import slow_key
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.correction import Correction
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.losses import loss
from fedveil.models.local.training import check_training, train_clients
from fedveil.models.networks.build import build

FEATURES = Task("features", (6,), ("a", "b", "c"))
TEXT = Task("text", (8,), ("ham", "spam"), vocabulary_size=50)
SMALL = Model(hidden=(5, 4), activation="tanh")


def features(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n))


def texts(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 30, (n, 8)).astype(np.int32)  # words 30 to 49 are in no text
    ids[np.arange(8) >= rng.integers(1, 9, n)[:, None]] = 0
    return Examples(ids, rng.integers(0, 2, n))


def orders(n: int, training: Training, stream: Stream) -> list[np.ndarray]:
    """The examples of each step: a permutation a pass, cut into batches."""
    size = n if training.batch_size == "full" else training.batch_size
    steps: list[np.ndarray] = []
    for number in itertools.count():
        if len(steps) >= (training.steps or training.epochs * -(-n // size)):
            break
        keys = [slow_key(stream, "batches", number * 2**32 + i) >> 33 for i in range(n)]
        order = np.array(sorted(range(n), key=lambda i: (keys[i], i)))
        steps += [order[first : first + size] for first in range(0, n, size)]
    return steps[: training.steps]


def numpy_sgd(
    start: dict[str, Tensor], client: Examples, training: Training, rate: float, stream: Stream, mu: float
) -> tuple[dict[str, np.ndarray], float]:
    """SGD on an mlp with tanh, forward and backward by hand, in float64."""
    names = ["dense1", "dense2", "output"]
    origin = {key: tensor.double().numpy() for key, tensor in start.items()}
    w = {key: array.copy() for key, array in origin.items()}
    velocity: dict[str, np.ndarray] = {}
    total, seen = 0.0, 0
    for chosen in orders(len(client), training, stream):
        layers = [client.features[chosen].astype(np.float64)]
        for name in names[:-1]:
            layers.append(np.tanh(layers[-1] @ w[f"{name}.weight"].T + w[f"{name}.bias"]))
        logits = layers[-1] @ w["output.weight"].T + w["output.bias"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        truth = np.eye(3)[client.labels[chosen]]
        total, seen = total - np.log((p * truth).sum(1)).sum(), seen + len(chosen)
        error = (p - truth) / len(chosen)
        gradient = {}
        for depth in (2, 1, 0):
            gradient[f"{names[depth]}.weight"] = error.T @ layers[depth]
            gradient[f"{names[depth]}.bias"] = error.sum(0)
            error = error @ w[f"{names[depth]}.weight"] * (1 - layers[depth] ** 2)
        for key, g in gradient.items():
            g = g + mu * (w[key] - origin[key]) + training.weight_decay * w[key]
            velocity[key] = training.momentum * velocity[key] + g if key in velocity else g
            w[key] = w[key] - rate * (g + training.momentum * velocity[key] if training.nesterov else velocity[key])
    return w, total / seen


def torch_loop(
    network: nn.Module, start: dict[str, Tensor], client: Examples, training: Training, rate: float, stream: Stream
) -> tuple[dict[str, Tensor], float]:
    """The loop of any textbook: whole word tables, the proximal term in the loss, norms clipped by hand."""
    network = copy.deepcopy(network).train()
    network.load_state_dict(start)
    decay, listed = training.weight_decay, list(network.parameters())
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(listed, rate, training.momentum, weight_decay=decay, nesterov=training.nesterov),
        "adam": lambda: torch.optim.Adam(listed, rate, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(listed, rate, weight_decay=decay),
    }[training.optimizer]()
    total, seen = 0.0, 0
    for chosen in orders(len(client), training, stream):
        inputs = torch.from_numpy(client.features[chosen])
        inputs = inputs if inputs.is_floating_point() else inputs.long()
        optimizer.zero_grad()
        value = loss(network(inputs), torch.from_numpy(client.labels[chosen]), training.loss)
        total, seen = total + value.item() * len(chosen), seen + len(chosen)
        distance = sum(((p - start[name]) ** 2).sum() for name, p in network.named_parameters())
        (value + training.proximal_mu / 2 * distance).backward()
        norm = float(torch.cat([p.grad.flatten() for p in listed if p.grad is not None]).norm())
        if training.max_grad_norm is not None and norm > training.max_grad_norm:
            for p in listed:
                if p.grad is not None:
                    p.grad *= training.max_grad_norm / norm
        optimizer.step()
    return weights.get(network), total / seen


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 11),
    batch=st.one_of(st.integers(1, 6), st.just("full")),
    epochs=st.integers(1, 3),
    steps=st.one_of(st.none(), st.integers(1, 9)),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    mu=st.sampled_from([0.0, 1.0]),
    nesterov=st.booleans(),
)
def test_sgd_is_the_numpy_loop(
    n: int, batch: Any, epochs: int, steps: int | None, momentum: float, decay: float, mu: float, nesterov: bool
) -> None:
    training = Training(
        batch_size=batch,
        epochs=epochs,
        steps=steps,
        momentum=momentum,
        weight_decay=decay,
        nesterov=nesterov and momentum > 0,
        proximal_mu=mu,
    )
    network, client, stream = build(FEATURES, SMALL, Stream(1)), features(n), Stream(1, 2, 3)
    start = weights.get(network)
    found = train_clients(network, start, [client], training, 0.1, [stream], classes=3)
    expected, mean_loss = numpy_sgd(start, client, training, 0.1, stream, mu)
    for name, tensor in found.parameters.items():
        np.testing.assert_allclose(tensor[0].numpy(), expected[name], atol=2e-5, err_msg=name)
    assert found.loss.tolist() == pytest.approx([mean_loss], rel=1e-4)
    assert found.steps.tolist() == [len(orders(n, training, stream))]
    assert found.examples.tolist() == [n]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"proximal_mu": 0.7},
    {"max_grad_norm": 0.05},
    {"optimizer": "adam"},
    {"optimizer": "adam", "weight_decay": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.1, "proximal_mu": 0.7},
    {"optimizer": "adamw", "max_grad_norm": 0.05},
    {"loss": "squared_error"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("task", "model"),
    [
        (FEATURES, SMALL),
        (TEXT, Model(name="mlp", hidden=(5,), embedding=3, activation="tanh")),
        (TEXT, Model(name="bag", embedding=3)),
        (TEXT, Model(name="bag", embedding=1, pooling="sum")),
        (TEXT, Model(name="lstm", embedding=3, units=4)),
    ],
    ids=["features-mlp", "text-mlp", "bag", "bag-of-numbers", "lstm"],
)
def test_every_network_and_optimiser_is_the_plain_torch_loop(task: Task, model: Model, variant: dict[str, Any]) -> None:
    training = Training(batch_size=4, epochs=2, **variant)
    network, stream = build(task, model, Stream(1)), Stream(1, 2, 3)
    client = texts(10) if task.kind == "text" else features(10)
    start = weights.get(network)
    found = train_clients(network, start, [client], training, 0.05, [stream], classes=len(task.classes))
    expected, mean_loss = torch_loop(network, start, client, training, 0.05, stream)
    for name, tensor in found.parameters.items():
        torch.testing.assert_close(tensor[0], expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(tensor[0], start[name]), name
    assert found.loss.tolist() == pytest.approx([mean_loss], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_words_a_client_does_not_use_keep_the_global_vectors_to_the_bit(optimizer: Any) -> None:
    network, client = build(TEXT, Model(name="lstm"), Stream(1)), texts(12)
    start = weights.get(network)
    training = Training(optimizer=optimizer, proximal_mu=0.1)
    table = train_clients(network, start, [client], training, 0.05, [Stream(1)], classes=2).parameters[
        "embedding.weight"
    ]
    used = np.unique(client.features)
    used = used[used > 0]
    unused = np.setdiff1d(np.arange(50), used)
    assert torch.equal(table[0][unused], start["embedding.weight"][unused])
    assert (table[0][used] != start["embedding.weight"][used]).any(1).all()


def test_a_bag_of_numbers_from_zero_takes_the_first_step_of_the_book() -> None:
    network = build(TEXT, Model(name="bag", embedding=1, pooling="sum", initialization="zeros"), Stream(1))
    client = texts(9)
    training = Training(batch_size="full")
    found = train_clients(network, weights.get(network), [client], training, 0.5, [Stream(1)], classes=2)
    expected = np.zeros(50)
    for text, label in zip(client.features, client.labels, strict=True):
        for word in text[text != 0]:
            expected[word] += 0.5 / 9 * (label - 0.5)  # the sigmoid of zero is a half
    np.testing.assert_allclose(found.parameters["embedding.weight"][0, :, 0].numpy(), expected, atol=1e-6)


def cohort() -> tuple[nn.Module, dict[str, Tensor], list[Examples], list[Stream]]:
    network = build(FEATURES, Model(hidden=(5,), dropout=0.3), Stream(1))
    clients = [features(n, seed=n) for n in (7, 16, 1, 33)]
    return network, weights.get(network), clients, [Stream(1, 5, client) for client in range(1, 5)]


def test_a_client_trains_to_the_same_bytes_whoever_is_beside_it() -> None:
    network, start, clients, streams = cohort()
    training = Training(batch_size=5, epochs=2, momentum=0.9)
    together = train_clients(network, start, clients, training, 0.1, streams, classes=3)
    assert together.steps.tolist() == [4, 8, 2, 14]
    assert together.examples.tolist() == [7, 16, 1, 33]
    assert together.loss.dtype == np.float64
    for picked in ([0], [1], [2], [3], [3, 1], [2, 0, 3]):
        some = train_clients(
            network, start, [clients[k] for k in picked], training, 0.1, [streams[k] for k in picked], classes=3
        )
        for name, tensor in some.parameters.items():
            assert torch.equal(tensor, together.parameters[name][picked]), name
        assert some.loss.tolist() == together.loss[picked].tolist()


def test_texts_train_to_the_same_bytes_whoever_is_beside_them() -> None:
    network = build(TEXT, Model(name="lstm", dropout=0.2), Stream(1))
    start, streams, training = weights.get(network), [Stream(1, 5, k) for k in (1, 2)], Training(batch_size=5)
    clients = [texts(7), texts(11, seed=1)]
    together = train_clients(network, start, clients, training, 0.1, streams, classes=2)
    alone = train_clients(network, start, clients[1:], training, 0.1, streams[1:], classes=2)
    for name, tensor in alone.parameters.items():
        assert torch.equal(tensor[0], together.parameters[name][1]), name


def test_training_changes_neither_the_global_weights_nor_the_network_nor_random_states_nor_the_examples() -> None:
    network, start, clients, streams = cohort()
    other = {name: tensor + 1 for name, tensor in start.items()}
    given, inputs = {name: tensor.clone() for name, tensor in other.items()}, clients[0].features.copy()
    network.eval()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    trained = train_clients(network, other, clients, Training(), 0.1, streams, classes=3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not network.training
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, start[name])
        assert torch.equal(other[name], given[name])
        assert parameter.grad is None
    np.testing.assert_array_equal(clients[0].features, inputs)
    for tensor in trained.parameters.values():
        tensor.zero_()  # the results are nobody else's memory
    assert all(torch.equal(other[name], given[name]) for name in other)


@pytest.mark.parametrize("chosen", [{}, {"dropout": 0.4}, {"shift": 1, "noise": 0.1, "rotation": 10.0}], ids=str)
def test_the_same_stream_gives_the_same_bytes_and_another_stream_others(chosen: dict[str, Any]) -> None:
    task = Task("images", (1, 6, 6), ("a", "b", "c"))
    model = Model(hidden=(5,), dropout=chosen.get("dropout", 0.0))
    training = Training(batch_size=4, **{key: value for key, value in chosen.items() if key != "dropout"})
    network = build(task, model, Stream(1))
    rng = np.random.default_rng(0)
    client = Examples(rng.random((10, 1, 6, 6), dtype=np.float32), rng.integers(0, 3, 10))

    def train(stream: Stream) -> Tensor:
        found = train_clients(network, weights.get(network), [client], training, 0.1, [stream], classes=3)
        return found.parameters["dense1.weight"]

    torch.manual_seed(1)
    first = train(Stream(1, 2, 3))
    torch.manual_seed(2)
    assert torch.equal(first, train(Stream(1, 2, 3)))
    for other in (Stream(2, 2, 3), Stream(1, 3, 3), Stream(1, 2, 4)):
        assert not torch.equal(first, train(other))


@pytest.mark.parametrize("source", ["dropout", "noise", "neither"])
def test_dropout_and_augmentation_come_from_each_clients_own_stream(source: str) -> None:
    task = Task("images", (1, 6, 6), ("a", "b", "c"))
    network = build(
        task, Model(hidden=(50,), activation="tanh", dropout=0.4 if source == "dropout" else 0.0), Stream(1)
    )
    alike = Examples(np.full((6, 1, 6, 6), 0.5, dtype=np.float32), np.ones(6, dtype=np.int64))  # in any order
    training = Training(batch_size="full", noise=0.1 if source == "noise" else 0.0)
    streams = [Stream(1, 2, 3), Stream(1, 2, 4), Stream(1, 3, 3)]
    moved = train_clients(network, weights.get(network), [alike] * 3, training, 0.1, streams, classes=3).parameters
    one, other, later = moved["dense1.weight"]
    assert torch.equal(one, other) == torch.equal(one, later) == (source == "neither")


@pytest.mark.parametrize("chosen", [{"shift": 2}, {"rotation": 30.0}, {"noise": 0.5}], ids=str)
def test_augmentation_reaches_the_network(chosen: dict[str, Any]) -> None:
    seen: list[Tensor] = []

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x.flatten(1))

    network = Watching(36, 3)
    client = Examples(np.random.default_rng(0).random((8, 1, 6, 6), dtype=np.float32), np.arange(8) % 3)
    for training in (Training(batch_size=8), Training(batch_size=8, **chosen)):
        train_clients(network, weights.get(network), [client], training, 0.1, [Stream(1)], classes=3)
    plain, augmented = seen
    assert plain.shape == augmented.shape
    assert not torch.equal(plain, augmented)


def test_as_many_steps_as_epochs_have_are_the_same_training() -> None:
    network, start, clients, streams = cohort()
    epochs = train_clients(network, start, clients[:1], Training(batch_size=3, epochs=2), 0.1, streams[:1], classes=3)
    steps = train_clients(network, start, clients[:1], Training(batch_size=3, steps=6), 0.1, streams[:1], classes=3)
    assert steps.steps.tolist() == [6]
    for name, tensor in epochs.parameters.items():
        assert torch.equal(tensor, steps.parameters[name])


def test_the_loss_of_one_full_step_is_that_of_the_global_weights() -> None:
    network, client = build(FEATURES, SMALL, Stream(1)), features(20)
    start = weights.get(network)
    found = train_clients(
        network, start, [client], Training(batch_size="full", proximal_mu=5.0), 0.1, [Stream(1)], classes=3
    )
    assert found.loss[0] == pytest.approx(evaluate(network, start, client, "cross_entropy").loss, rel=1e-5)


def test_a_clipped_step_is_as_long_as_the_bound() -> None:
    network, client = build(FEATURES, SMALL, Stream(1)), features(20)
    start = weights.get(network)
    training = Training(batch_size="full", max_grad_norm=0.01)
    moved = train_clients(network, start, [client], training, 1.0, [Stream(1)], classes=3).parameters
    length = torch.cat([(moved[name][0] - start[name]).flatten() for name in start]).norm()
    assert float(length) == pytest.approx(0.01, rel=1e-3)


def test_a_correction_that_is_passed_comes_before_the_settings() -> None:
    network, start, clients, streams = cohort()

    def train(mu: float, passed: float | None) -> Tensor:
        training = Training(batch_size=3, proximal_mu=mu)
        pull = None if passed is None else Correction(passed)
        trained = train_clients(network, start, clients[:1], training, 0.1, streams[:1], classes=3, correction=pull)
        return trained.parameters["output.weight"]

    assert torch.equal(train(0.0, 2.0), train(2.0, None))
    assert torch.equal(train(2.0, 0.0), train(0.0, None))
    assert not torch.equal(train(2.0, None), train(0.0, None))


def test_weights_the_user_froze_stay_and_weights_the_loss_does_not_use_are_no_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.output, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.output(self.frozen(x))
            return logits

    network = Odd()
    start = weights.get(network)
    training = Training(proximal_mu=0.5, weight_decay=0.1, max_grad_norm=1.0)
    moved = train_clients(network, start, [features(20)], training, 0.1, [Stream(1)], classes=3).parameters
    changed = {name for name in start if not torch.equal(moved[name][0], start[name])}
    assert changed == {"output.weight", "output.bias"}


def test_a_loss_that_is_not_finite_is_returned() -> None:
    network, start, clients, streams = cohort()
    wild = Examples(np.full((4, 6), np.inf, dtype=np.float32), clients[0].labels[:4])
    found = train_clients(network, start, [wild, clients[0]], Training(), 0.1, streams[:2], classes=3)
    assert not np.isfinite(found.loss[0])
    assert np.isfinite(found.loss[1])


def test_a_client_that_cannot_be_trained_is_named() -> None:
    network, start, clients, _ = cohort()
    stream = [Stream(1, 2, 41)]
    with pytest.raises(DataError, match="client 41 has no examples to train on"):
        train_clients(network, start, [features(0)], Training(), 0.1, stream, classes=3)
    wrong = Examples(clients[0].features, clients[0].labels + 1)
    with pytest.raises(DataError, match="client 41 has labels from 1 to 3; with 3 classes they must be from 0 to 2"):
        train_clients(network, start, [wrong], Training(), 0.1, stream, classes=3)
    other = {name: tensor for name, tensor in start.items() if name != "output.bias"}
    with pytest.raises(DataError, match=r"'output.bias' is missing in the weights"):
        train_clients(network, other, clients[:1], Training(), 0.1, stream, classes=3)


@pytest.mark.parametrize("chosen", [{"shift": 1}, {"rotation": 5.0}, {"noise": 0.1}], ids=str)
def test_augmentation_of_what_is_no_image_is_refused_by_name(chosen: dict[str, Any]) -> None:
    ((key, value),) = chosen.items()
    for task in (FEATURES, TEXT):
        check_training(task, Training())
        with pytest.raises(SettingsError, match=rf"training.{key} = {value}: changes images.*{task.kind}"):
            check_training(task, Training(**chosen))
    check_training(Task("images", (1, 6, 6), ("a", "b")), Training(**chosen))


@pytest.mark.slow
def test_an_mlp_learns_real_digits() -> None:
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test = Examples(images[:1400], labels[:1400]), Examples(images[1400:], labels[1400:])
    task = Task("images", (1, 8, 8), tuple("0123456789"))
    network = build(task, Model(hidden=(32,)), Stream(1))
    training = Training(epochs=10, batch_size=16, momentum=0.9)
    trained = train_clients(network, weights.get(network), [train], training, 0.05, [Stream(1)], classes=10)
    learnt = {name: tensor[0] for name, tensor in trained.parameters.items()}
    assert evaluate(network, learnt, test, "cross_entropy").accuracy > 0.9
    assert evaluate(network, None, test, "cross_entropy").accuracy < 0.3
