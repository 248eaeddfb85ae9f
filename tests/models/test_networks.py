"""Networks: what they compute, how they start, and what is refused."""

from __future__ import annotations

import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError, TrainingError
from fedveil.core.examples import Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.section import Section
from fedveil.models.local.inputs import compute
from fedveil.models.networks.build import build

IMAGES = Task("images", (1, 6, 5), ("a", "b", "c"))
FEATURES = Task("features", (7,), ("no", "yes"))
TEXT = Task("text", (9,), ("ham", "spam"), vocabulary_size=40)
STREAM = Stream(3)


def own(monkeypatch: pytest.MonkeyPatch, factory: Callable[[Task, Any], object]) -> Model:
    """Settings that name `factory` as a user's own network."""
    module = types.ModuleType("users_networks")
    module.factory = factory
    monkeypatch.setitem(sys.modules, "users_networks", module)
    return Model(name="users_networks:factory")


def texts(lengths: list[int], width: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), width), dtype=np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(1, TEXT.vocabulary_size, length)
    return torch.from_numpy(ids)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "elu", "sigmoid", "tanh"])
def test_an_mlp_computes_its_layers_in_order(activation: str) -> None:
    network = build(IMAGES, Model(hidden=(8, 4), activation=activation, normalization="layer"), STREAM).eval()
    images = torch.rand(5, 1, 6, 5)
    w = {name: p.detach().double().numpy() for name, p in network.named_parameters()}

    def act(x: np.ndarray, layer: int) -> np.ndarray:
        slope = w.get(f"activation{layer}.weight", np.array([0.25]))[0]
        result: np.ndarray = {
            "relu": np.maximum(x, 0),
            "leaky_relu": np.where(x > 0, x, 0.01 * x),
            "prelu": np.where(x > 0, x, slope * x),
            "elu": np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
            "sigmoid": 1 / (1 + np.exp(-x)),
            "tanh": np.tanh(x),
        }[activation]
        return result

    x = images.double().numpy().reshape(5, -1)
    for layer in (1, 2):
        x = x @ w[f"dense{layer}.weight"].T + w[f"dense{layer}.bias"]
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = act(x * w[f"norm{layer}.weight"] + w[f"norm{layer}.bias"], layer)
    x = x @ w["output.weight"].T + w["output.bias"]
    np.testing.assert_allclose(network(images).detach().numpy(), x, atol=1e-5)


def test_parameter_names_are_stable() -> None:
    def names(task: Task, model: Model) -> list[str]:
        return [name for name, _ in build(task, model, STREAM).named_parameters()]

    dense = ["dense1.weight", "dense1.bias", "output.weight", "output.bias"]
    assert names(IMAGES, Model(hidden=(8,))) == dense
    assert names(IMAGES, Model(hidden=(8,), dropout=0.5)) == dense
    assert names(TEXT, Model(hidden=(8,))) == ["embedding.weight", *dense]
    assert names(TEXT, Model(name="bag")) == ["embedding.weight", "output.weight", "output.bias"]
    assert names(TEXT, Model(name="bag", embedding=1)) == ["embedding.weight"]
    gates = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    recurrent = [f"lstm.{gate}" for gate in gates]
    assert names(TEXT, Model(name="lstm")) == ["embedding.weight", *recurrent, "output.weight", "output.bias"]


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("name", ["bag", "mlp"])
def test_a_bag_pools_the_vectors_of_real_words(name: str, pooling: str) -> None:
    network = build(
        TEXT, Model(name=name, embedding=6, pooling=pooling, **({"hidden": ()} if name == "mlp" else {})), STREAM
    )
    w = {key: p.detach().numpy() for key, p in network.named_parameters()}
    ids = texts([9, 3, 1, 0], 9)
    outputs = network(ids).detach().numpy()
    for text, output in zip(ids.numpy(), outputs, strict=True):
        vectors = w["embedding.weight"][text[text != 0]]  # [words, 6]
        pooled = vectors.sum(0) / (max(len(vectors), 1) if pooling == "mean" else 1)
        np.testing.assert_allclose(output, w["output.weight"] @ pooled + w["output.bias"], atol=1e-5)


def test_a_bag_of_single_numbers_is_their_sum() -> None:
    network = build(TEXT, Model(name="bag", embedding=1, pooling="sum"), STREAM)
    table = network.get_parameter("embedding.weight").detach()
    ids = texts([9, 4, 0], 9)
    expected = [[sum(float(table[word, 0]) for word in text if word)] for text in ids.tolist()]
    torch.testing.assert_close(network(ids), torch.tensor(expected))


def test_a_bag_of_single_numbers_keeps_its_linear_layer_for_three_classes() -> None:
    task = Task("text", (9,), ("a", "b", "c"), vocabulary_size=40)
    assert build(task, Model(name="bag", embedding=1), STREAM)(texts([2, 3], 9)).shape == (2, 3)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 12),
    pooling=st.sampled_from(["mean", "last"]),
    layers=st.integers(1, 2),
)
def test_an_lstm_reads_each_text_as_if_alone_and_without_padding(
    lengths: list[int], padding: int, pooling: str, layers: int
) -> None:
    model = Model(name="lstm", units=5, embedding=4, pooling=pooling, layers=layers)
    network = build(TEXT, model, STREAM)
    ids = texts(lengths, 9)
    outputs = network(torch.nn.functional.pad(ids, (0, padding)))
    for text, length, output in zip(ids, lengths, outputs, strict=True):
        pooled = torch.zeros(5)
        if length:
            states = network.lstm(network.embedding(text[:length].unsqueeze(0)))[0][0]  # [length, units]
            pooled = states.mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(output, network.output(pooled), atol=1e-5, rtol=1e-4)


def test_an_lstm_cell_computes_its_published_equations() -> None:
    network = build(TEXT, Model(name="lstm", units=5, embedding=4, pooling="last"), STREAM)
    w = {key: p.detach().double().numpy() for key, p in network.named_parameters()}
    ids = texts([6], 9)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    h = c = np.zeros(5)
    for word in ids[0, :6].tolist():
        x = w["embedding.weight"][word]
        gates = w["lstm.weight_ih_l0"] @ x + w["lstm.bias_ih_l0"] + w["lstm.weight_hh_l0"] @ h + w["lstm.bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    expected = w["output.weight"] @ h + w["output.bias"]
    np.testing.assert_allclose(network(ids).detach().numpy()[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bag", "mlp", "lstm"])
def test_the_padding_row_does_not_count_even_where_it_is_not_zero(name: str) -> None:
    network = build(TEXT, Model(name=name), STREAM)
    ids = texts([9, 2, 0], 9)
    before = network(ids)
    with torch.no_grad():
        network.get_parameter("embedding.weight")[0] = 100.0
    torch.testing.assert_close(network(ids), before)


@pytest.mark.parametrize(
    ("initialization", "deviation"),
    [("he", math.sqrt(2 / 400)), ("lecun", math.sqrt(1 / 400)), ("xavier", math.sqrt(2 / (400 + 300)))],
)
def test_dense_weights_start_with_the_published_spread(initialization: str, deviation: float) -> None:
    task = Task("features", (400,), ("no", "yes"))
    network = build(task, Model(hidden=(300,), initialization=initialization), STREAM)
    weight, bias = network.get_parameter("dense1.weight").detach(), network.get_parameter("dense1.bias")
    assert float(weight.std()) == pytest.approx(deviation, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=deviation / 50)
    largest = float(weight.abs().max()) / deviation
    assert largest <= math.sqrt(3) + 1e-6 if initialization == "xavier" else largest > 3  # uniform, or normal
    assert not bias.any()


@pytest.mark.parametrize("name", ["mlp", "bag", "lstm"])
def test_zeros_sets_every_weight_to_zero(name: str) -> None:
    network = build(TEXT, Model(name=name, initialization="zeros"), STREAM)
    assert not any(p.any() for p in network.parameters())


@pytest.mark.parametrize("name", ["mlp", "bag", "lstm"])
def test_word_vectors_start_as_standard_normal_and_padding_as_zero(name: str) -> None:
    task = Task("text", (9,), ("ham", "spam"), vocabulary_size=2000)
    table = build(task, Model(name=name), STREAM).get_parameter("embedding.weight").detach()
    assert not table[0].any()
    assert float(table[1:].mean()) == pytest.approx(0, abs=0.02)
    assert float(table[1:].std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["mlp", "bag", "lstm"])
def test_initial_weights_come_from_the_stream_and_leave_global_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build(TEXT, Model(name=name), Stream(seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_dropout_acts_in_training_only() -> None:
    for task, model in [
        (FEATURES, Model(dropout=0.5)),
        (TEXT, Model(name="lstm", dropout=0.5)),
        (TEXT, Model(name="lstm", dropout=0.5, layers=2)),
    ]:
        network = build(task, model, STREAM)
        inputs = texts([9] * 4, 9) if task.kind == "text" else torch.rand(4, 7)
        network.train()
        assert not torch.equal(network(inputs), network(inputs))
        network.eval()
        assert torch.equal(network(inputs), network(inputs))


def test_stacked_lstm_layers_have_dropout_between_them() -> None:
    network = build(TEXT, Model(name="lstm", dropout=0.5, layers=2), STREAM).train()
    network.get_submodule("dropout").eval()  # the one before the output
    assert not torch.equal(network(texts([9] * 4, 9)), network(texts([9] * 4, 9)))


def test_a_users_own_network_is_called_with_task_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given_to: list[object] = []

    class Own(Section):
        bias: bool = True

    @part(Own)
    def factory(task: Task, settings: Own) -> nn.Module:
        given_to.extend([task, settings])
        return nn.Linear(7, 1, settings.bias)

    model = own(monkeypatch, factory)
    network = build(FEATURES, model, STREAM)
    assert isinstance(network, nn.Linear)
    assert network.training
    build(FEATURES, Model(name=model.name, bias=False), STREAM)
    assert given_to == [FEATURES, Own(), FEATURES, Own(bias=False)]


class Counting(nn.Module):
    """Keeps a running mean of its inputs, as batch norm does, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(7, 2)
        self.register_buffer("running", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running += 1
        logits: Tensor = self.output(x)
        return logits


class Lambda(nn.Module):
    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(x)


class Auxiliary(nn.Module):
    """Gives more in training than in evaluation, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.training else x


class Projected(nn.Module):
    """Projects its inputs by a matrix that is drawn once and never trained."""

    def __init__(self, rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("projection", torch.from_numpy(rng.standard_normal((7, 4))).to(dtype))
        self.output = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(x @ self.get_buffer("projection").float())
        return logits


def broken(task: Task, model: Model) -> nn.Module:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda t, m: nn.Linear(7, 3), r"gives float32 \[2, 3\].*float \[2, 2\] or \[2, 1\]"),
        (lambda t, m: nn.Flatten(), r"no weights to train"),
        (lambda t, m: nn.Linear(7, 2).double(), r"'weight' is torch.float64; all must be torch.float32"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), nn.LSTM(2, 2)), r"gives tuple"),
        (lambda t, m: nn.Linear(8, 2), r"cannot be built.*RuntimeError.*shapes"),
        (lambda t, m: "a network", r"returned str, not a torch.nn.Module"),
        (broken, r"RuntimeError: out of ideas"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2)), r"'1' keeps statistics.*LayerNorm"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2)), r"track_running_stats=False"),
        (lambda t, m: Counting(), r"'running' keeps statistics.*LayerNorm"),
        (lambda t, m: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(7, 2))), r"'0.parametrizations.*_u' keeps"),
        (lambda t, m: nn.Sequential(Lambda(lambda x: x[:, None]), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), nn.Linear(7, 2)),
         r"'1' keeps statistics"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), Lambda(torch.squeeze)),
         r"for a batch of one example the network gives float32 \[2\]; it must give logits, float \[1, 2\].*squeeze"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), Lambda(lambda x: x[:2])), r"for three examples the network gives float32 \[2, 2\]"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), Lambda(lambda x: x.view(2, 2))),
         r"for a batch of one example in evaluation the network raises RuntimeError.*any size"),
        (lambda t, m: nn.Sequential(nn.Linear(7, 2), Auxiliary()), r"for two examples the network gives tuple"),
        (lambda t, m: Projected(np.random.default_rng()), r"buffer 'projection' has other values each time"),
        (lambda t, m: Projected(np.random.default_rng(1), torch.bfloat16), r"buffer 'projection' is torch.bfloat16"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_work_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, factory: Callable[[Task, Any], object], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        build(FEATURES, own(monkeypatch, factory), STREAM)


def test_a_buffer_that_training_leaves_alone_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(7, 2)
    network.register_buffer("mean", torch.tensor([1.0, math.nan, -math.inf, 0, 0, 0, 0]))
    assert build(FEATURES, own(monkeypatch, lambda t, m: network), STREAM) is network


@pytest.mark.parametrize(
    "draw", [np.random.random, lambda shape: torch.rand(shape), lambda shape: [random.random()] * 7]
)
def test_what_a_factory_draws_from_global_generators_comes_from_the_seed(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[Any], Any]
) -> None:
    class Drawn(nn.Linear):
        def __init__(self) -> None:
            super().__init__(7, 2)
            self.register_buffer("drawn", torch.as_tensor(draw((7,))))

    model = own(monkeypatch, lambda t, m: Drawn())
    first, again, other = (build(FEATURES, model, Stream(seed)).get_buffer("drawn") for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("layer", [
    lambda: nn.BatchNorm1d(4, track_running_stats=False), lambda: nn.LazyBatchNorm1d(track_running_stats=False),
])  # fmt: skip
def test_batch_norm_without_running_statistics_is_a_network(monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
    factory = lambda t, m: nn.Sequential(nn.Linear(7, 4), layer(), nn.Linear(4, 2))  # noqa: E731
    network = build(FEATURES, own(monkeypatch, factory), STREAM)
    assert network.training
    with pytest.raises(TrainingError, match=r"client 3: a batch of one example.*training.batch_size.*GroupNorm"):
        compute(network, torch.zeros(1, 7), "client 3")
    assert compute(network, torch.zeros(2, 7), "client 3").shape == (2, 2)


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        (
            IMAGES,
            {"name": "lstm"},
            "'lstm': is for classification of text, and the task of the data is classification of images; take 'mlp'",
        ),
        (
            FEATURES,
            {"name": "bag"},
            "'bag': is for classification of text, and the task of the data is classification of features",
        ),
        (TEXT, {"name": "lstm", "pooling": "sum"}, "model.pooling = 'sum'.*'mean' or 'last'"),
        (TEXT, {"name": "bag", "pooling": "last"}, "model.pooling = 'last'.*'mean' or 'sum'"),
        (TEXT, {"name": "mlp", "pooling": "last"}, "model.pooling = 'last'.*'mean' or 'sum'"),
        (FEATURES, {"normalization": "batch"}, "model.normalization = 'batch': batch norm keeps running.*Use 'layer'"),
        (FEATURES, {"name": "mpl"}, "model.name: no model is called 'mpl'; did you mean 'mlp'"),
        (FEATURES, {"name": "nowhere:factory"}, "model.name: 'nowhere:factory' cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(task: Task, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        build(task, Model(**settings), STREAM)
