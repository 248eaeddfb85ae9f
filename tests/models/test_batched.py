"""All clients at once against the plain loop, one by one: in float64, so that only rounding may differ."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.core.errors import TrainingError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local import training as training_module
from fedveil.models.local.batches import orders
from fedveil.models.local.correction import Correction
from fedveil.models.local.training import Trained, train_clients
from fedveil.models.networks.build import build, example
from fedveil.models.networks.words import PooledWords, Words
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.rules import layers

FEATURES = Task("features", (6,), ("a", "b", "c"))
PAIR = Task("features", (6,), ("a", "b"))
IMAGES = Task("images", (1, 5, 4), ("a", "b", "c"))
TEXT = Task("text", (8,), ("ham", "spam"), vocabulary_size=50)


def examples(task: Task, n: int, seed: int, kind: type = np.float64) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(task.classes), n)
    if task.kind == "text":
        ids = rng.integers(1, 30, (n, 8)).astype(np.int32)  # words 30 to 49 are in no text
        ids[np.arange(8) >= rng.integers(0, 9, n)[:, None]] = 0  # and some texts have no words
        return Examples(ids, labels)
    return Examples(rng.random((n, *task.shape)).astype(kind), labels)


def both(
    network: nn.Module,
    task: Task,
    sizes: list[int],
    training: Training,
    mu: float | None = None,
    kind: type = np.float64,
) -> tuple[Trained, Trained, dict[str, Tensor]]:
    """The plain loop's result, that of all at once, and the weights before."""
    start = weights.get(network)
    clients = [examples(task, n, seed, kind) for seed, n in enumerate(sizes)]
    streams = [Stream(7, 3, client) for client in range(len(sizes))]
    probe = example(task)
    how = batched(network, probe if task.kind == "text" else probe.to(next(iter(start.values())).dtype))
    assert not isinstance(how, str), how
    arguments = (network, start, clients, training, training.learning_rate, streams)
    classes = len(task.classes)
    pull = None if mu is None else Correction(mu)
    plain = train_clients(*arguments, classes=classes, correction=pull)
    return plain, train_clients(*arguments, classes=classes, correction=pull, together=how), start


def assert_same(plain: Trained, together: Trained, tolerance: float) -> None:
    assert list(plain.parameters) == list(together.parameters)
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(together.parameters[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    np.testing.assert_allclose(together.loss, plain.loss, rtol=10 * tolerance, atol=tolerance)
    np.testing.assert_array_equal(together.steps, plain.steps)
    np.testing.assert_array_equal(together.examples, plain.examples)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    optimizer = draw(st.sampled_from(["sgd", "sgd", "adam", "adamw"]))
    momentum = draw(st.sampled_from([0.0, 0.9])) if optimizer == "sgd" else 0.0
    return Training(
        epochs=draw(st.integers(1, 3)),
        steps=draw(st.sampled_from([None, None, 1, 5])),
        batch_size=draw(st.sampled_from([1, 2, 3, 4, 8, "full"])),
        learning_rate=draw(st.sampled_from([0.05, 0.5])) if optimizer == "sgd" else 0.01,
        optimizer=optimizer,
        momentum=momentum,
        nesterov=draw(st.booleans()) if momentum else False,
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        loss=draw(st.sampled_from(["cross_entropy", "squared_error"])),
        max_grad_norm=draw(st.sampled_from([None, 0.1])),
        proximal_mu=draw(st.sampled_from([0.0, 0.3])),
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[Task, Model]:
    task = draw(st.sampled_from([FEATURES, PAIR, IMAGES, TEXT]))
    dropout = draw(st.sampled_from([0.0, 0.3]))
    if task is TEXT:
        name = draw(st.sampled_from(["lstm", "bag", "mlp"]))
        pooling = draw(st.sampled_from(["mean", "last" if name == "lstm" else "sum"]))
        layers = draw(st.integers(1, 2)) if not dropout else 1
        size = draw(st.sampled_from([1, 3]))
        own = {
            "lstm": {"layers": layers, "units": 4, "dropout": dropout},
            "bag": {},
            "mlp": {"hidden": (5,), "dropout": dropout},
        }
        return task, Model(name=name, pooling=pooling, embedding=size, **own[name])
    return task, Model(
        hidden=draw(st.sampled_from([(), (5,), (5, 4)])),
        activation=draw(st.sampled_from(["relu", "leaky_relu", "prelu", "elu", "sigmoid", "tanh"])),
        normalization=draw(st.sampled_from(["none", "layer"])),
        dropout=dropout,
    )


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(models(), trainings(), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_all_at_once_is_the_plain_loop(model, training, sizes, seed):
    """Every optimiser, loss, clipping, proximal term and layer, over clients of different sizes and numbers of steps."""
    task, settings_ = model
    network = build(task, settings_, Stream(seed)).double()
    plain, together, start = both(network, task, sizes, training)
    assert_same(plain, together, 1e-9)
    assert any((plain.parameters[name][0] != tensor).any() for name, tensor in start.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("task", [IMAGES, TEXT], ids=["images", "text"])
def test_in_float32_the_two_agree_to_the_stated_tolerance(task, optimizer):
    """1e-5; for adam, which divides by gradients however small they are, a hundredth of the learning rate a step."""
    training = Training(epochs=2, batch_size=4, optimizer=optimizer, learning_rate=0.1 if optimizer == "sgd" else 0.01)
    network = build(task, Model(name="lstm", units=6) if task is TEXT else Model(hidden=(8, 8)), Stream(1))
    plain, together, _ = both(network, task, [17, 5, 9], training, kind=np.float32)
    assert_same(plain, together, 1e-5 if optimizer == "sgd" else 0.01 * 0.01 * int(plain.steps.max()))


def test_augmentation_comes_from_each_clients_own_stream():
    training = Training(epochs=2, batch_size=4, shift=1, rotation=20.0, noise=0.1)
    plain, together, _ = both(build(IMAGES, Model(hidden=(8,)), Stream(1)), IMAGES, [9, 5], training, kind=np.float32)
    assert_same(plain, together, 1e-5)


@pytest.mark.parametrize(
    "extra",
    [{"momentum": 0.9}, {"weight_decay": 0.5}, {"optimizer": "adam"}, {"optimizer": "adamw", "weight_decay": 0.5}],
    ids=["momentum", "weight decay", "adam", "adamw"],
)
def test_a_client_that_has_finished_is_frozen(extra):
    """A zero gradient would still move it: momentum, decay and Adam go on without one."""
    training = Training(batch_size=2, learning_rate=0.1, **extra)
    network = build(FEATURES, Model(hidden=(5,)), Stream(1)).double()
    _, alone, _ = both(network, FEATURES, [2], training)
    _, together, _ = both(network, FEATURES, [2, 40], training)
    for name, tensor in alone.parameters.items():
        torch.testing.assert_close(together.parameters[name][0], tensor[0], rtol=1e-12, atol=1e-12)


def test_a_smaller_last_batch_divides_by_its_own_size():
    """Five examples in batches of four: the last one's gradient counts whole, not a quarter."""
    training = Training(batch_size=4, learning_rate=1.0)
    network = nn.Sequential(nn.Linear(6, 3)).double()
    client = examples(FEATURES, 5, 0)
    _, together, start = both(network, FEATURES, [5, 40], training)
    order = orders(5, training, [Stream(7, 3, 0)])[0, 0]
    w, b = start["0.weight"].numpy().copy(), start["0.bias"].numpy().copy()
    for batch in (order[:4], order[4:]):
        x, y = client.features[batch], client.labels[batch]
        p = np.exp(x @ w.T + b)
        slope = p / p.sum(1, keepdims=True) - np.eye(3)[y]
        w, b = w - slope.T @ x / len(batch), b - slope.mean(0)
    np.testing.assert_allclose(together.parameters["0.weight"][0].numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(together.parameters["0.bias"][0].numpy(), b, rtol=1e-12)


def test_dropouts_masks_do_not_depend_on_the_other_clients():
    training = Training(epochs=2, batch_size=3)
    network = build(FEATURES, Model(hidden=(9, 9), dropout=0.5), Stream(1)).double()
    plain, alone, _ = both(network, FEATURES, [7], training)
    _, among, _ = both(network, FEATURES, [7, 2, 30], training)
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(alone.parameters[name], tensor, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(among.parameters[name][0], tensor[0], rtol=1e-12, atol=1e-12)


class Convolution(nn.Module):
    """A user's network, with a weight that no example uses and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(1, 2, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)
        self.output = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.output(self.convolve(images).relu().flatten(1)) * self.fixed
        return found


@pytest.mark.parametrize(
    "extra",
    [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"momentum": 0.5, "max_grad_norm": 0.1, "proximal_mu": 0.2}],
    ids=["sgd", "adamw", "momentum, clipped, proximal"],
)
def test_a_network_without_layer_rules_is_batched_by_torch_func(extra):
    torch.manual_seed(0)
    network = Convolution().double()
    assert isinstance(batched(network, example(IMAGES).double()), Functional)
    training = Training(epochs=2, batch_size=3, learning_rate=0.1, **extra)
    plain, together, start = both(network, IMAGES, [7, 1, 4], training)
    assert_same(plain, together, 1e-9)
    assert (together.parameters["unused"] == start["unused"]).all()
    assert (together.parameters["fixed"] == start["fixed"]).all()


class Texts(nn.Module):
    """A user's text network: a padded table, frozen or not, a scalar weight, and a mean."""

    def __init__(self, table: nn.Embedding, frozen: bool = False) -> None:
        super().__init__()
        self.table = table
        self.table.weight.requires_grad_(not frozen)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.tensor(0.25))
        self.output = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.output(self.table(ids).mean(1) * self.scale + self.offset)
        return found


class Tied(nn.Module):
    """One weight used twice: the first layer's and, turned, the last's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 3)
        self.last.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(self.first(features).tanh()).tanh())
        return found


def sharing() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6), nn.Linear(6, 3))
    network[3].weight = network[0].weight
    return network


def half_frozen() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    network[0].requires_grad_(False)
    return network


OWN = {
    "a padded embedding": (TEXT, lambda: Texts(nn.Embedding(50, 4, padding_idx=0))),
    "a word table": (TEXT, lambda: Texts(Words(50, 4))),
    "a frozen word table": (TEXT, lambda: Texts(Words(50, 4), frozen=True)),
    "a plain embedding": (TEXT, lambda: Texts(nn.Embedding(50, 4))),
    "tied weights": (FEATURES, Tied),
    "tied layers": (FEATURES, sharing),
    "a frozen layer": (FEATURES, half_frozen),
    "a convolution": (IMAGES, Convolution),
}


@pytest.mark.parametrize(
    "extra",
    [{}, {"optimizer": "adam", "learning_rate": 0.01}, {"momentum": 0.5, "max_grad_norm": 0.1, "proximal_mu": 0.2}],
    ids=["sgd", "adam", "momentum, clipped, proximal"],
)
@pytest.mark.parametrize("own", list(OWN))
def test_a_network_of_ones_own_is_the_plain_loop_or_is_not_batched(own, extra):
    """Also in evaluation mode, and with weights that are not those the network holds."""
    torch.manual_seed(0)
    task, make = OWN[own]
    network = make().double().eval()
    how = batched(network, example(task) if task is TEXT else example(task).double())
    if isinstance(how, str):
        assert own == "tied layers", how
        return
    start = {name: tensor + 0.1 * torch.rand_like(tensor) for name, tensor in weights.get(network).items()}
    clients = [examples(task, n, seed) for seed, n in enumerate((7, 1, 4))]
    streams = [Stream(7, 3, client) for client in range(3)]
    training = Training(**({"epochs": 2, "batch_size": 3, "learning_rate": 0.1} | extra))
    arguments = (network, start, clients, training, training.learning_rate, streams)
    plain = train_clients(*arguments, classes=len(task.classes))
    assert_same(plain, train_clients(*arguments, classes=len(task.classes), together=how), 1e-9)
    assert not network.training


def test_a_subclass_a_hook_and_a_full_dropout_have_no_rules():
    class Louder(PooledWords):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (1 + (ids == 0).sum(1, keepdim=True))

    backward = nn.Sequential(nn.Linear(6, 3))
    backward[0].register_full_backward_pre_hook(lambda module, gradient: (gradient[0] * 2,))
    weight = nn.Sequential(nn.Linear(6, 3))
    weight[0].weight.register_hook(lambda gradient: gradient * 2)
    for network in (
        nn.Sequential(Louder(50, 4, "mean"), nn.Linear(4, 2)),
        backward,
        weight,
        nn.Sequential(nn.Linear(6, 3), nn.Dropout(1.0)),
    ):
        assert layers(network) is None


def test_dropout_between_the_layers_of_an_lstm_is_named_as_the_reason():
    network = build(TEXT, Model(name="lstm", layers=2, dropout=0.2, units=4), Stream(1))
    assert "dropout between layers of an LSTM" in str(batched(network, example(TEXT)))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.output(features - features.mean(0))
        return found


class Branching(Mixing):
    def forward(self, features: Tensor) -> Tensor:
        return self.output(features) if features.sum() > 0 else self.output(-features)


class Dropping(Mixing):
    def forward(self, features: Tensor) -> Tensor:
        return self.output(nn.functional.dropout(features, 0.5, self.training))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Mixing(), "mixes the examples of a batch"),
        (Branching(), "cannot be computed for many clients at once"),
        (Dropping(), "cannot be computed for many clients at once"),
    ],
    ids=["mixing", "branching", "dropping"],
)
def test_what_cannot_be_batched_says_why_and_is_left_as_it_was(network, reason):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.eval()
    answer = batched(network, example(FEATURES))
    assert isinstance(answer, str)
    assert reason in answer
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_layer_used_twice_or_in_another_way_has_no_rules():
    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3))
    assert not isinstance(batched(twice, example(FEATURES)), Chain)
    hooked = nn.Sequential(nn.Linear(6, 3))
    hooked[0].register_forward_hook(lambda module, inputs, outputs: outputs * 2)
    assert not isinstance(batched(hooked, example(FEATURES)), Chain)
    unflattened = nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(15, 3))  # on the rows of images
    assert isinstance(batched(unflattened, example(IMAGES)), Functional)


@pytest.mark.parametrize("words", [(torch.OutOfMemoryError, "made up"), (RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED")], ids=["memory", "cublas"])  # fmt: skip
def test_where_memory_runs_out_the_parts_are_smaller_and_the_result_the_same(monkeypatch, words):
    """A GPU's fault, made up: more than two clients at once do not fit; and what a failed try took is free again."""
    real, parts, tried = training_module.train_together, [], []

    def limited(how, network, own, clients, *others):
        assert not any(reference() is not None for reference in tried)
        if len(clients) > 2:
            memory = torch.zeros(9)
            tried.append(weakref.ref(memory))
            raise words[0](words[1])
        parts.append(len(clients))
        return real(how, network, own, clients, *others)

    training = Training(batch_size=3, momentum=0.5)
    network = build(FEATURES, Model(hidden=(5,)), Stream(1)).double()
    monkeypatch.setattr(training_module, "train_together", limited)
    plain, together, _ = both(network, FEATURES, [7, 1, 4, 12, 3, 9, 2], training)
    assert_same(plain, together, 1e-9)
    assert sorted(parts) == [1, 2, 2, 2]
    assert len(tried) == 3


def test_a_single_client_that_does_not_fit_is_an_error(monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(training_module, "train_together", never)
    with pytest.raises(TrainingError, match="client 0: training it alone needs more memory than the GPU has free"):
        both(build(FEATURES, Model(hidden=(5,)), Stream(1)).double(), FEATURES, [3, 2], Training())


def test_results_go_where_they_are_asked_to_go_in_the_order_of_the_clients():
    network = build(FEATURES, Model(hidden=(5,)), Stream(1))
    start = weights.get(network)
    how = batched(network, example(FEATURES))
    assert isinstance(how, Chain)
    clients = [examples(FEATURES, n, n, np.float32) for n in (3, 30, 8)]
    streams = [Stream(7, 3, client) for client in range(3)]
    memory: dict[str, Any] = {name: torch.full((5, *t.shape), torch.nan) for name, t in start.items()}
    into = {name: tensor[1:4] for name, tensor in memory.items()}
    training = Training(batch_size=4)
    found = train_clients(network, start, clients, training, 0.1, streams, classes=3, together=how, into=into)
    wanted = train_clients(network, start, clients, training, 0.1, streams, classes=3)
    for name, tensor in memory.items():
        assert found.parameters[name] is into[name]
        torch.testing.assert_close(tensor[1:4], wanted.parameters[name], rtol=1e-5, atol=1e-6)
        assert tensor[0].isnan().all()
        assert tensor[4].isnan().all()
