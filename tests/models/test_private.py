"""DP-SGD against the slow obvious way: one example at a time by autograd, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local import private as private_module
from fedveil.models.local.augmentation import augment
from fedveil.models.local.batches import batch_size_of, steps_of
from fedveil.models.local.correction import Correction
from fedveil.models.local.losses import loss
from fedveil.models.local.private import Draws, Private, made_up, poisson_batches, private_way, rate_of, seeded
from fedveil.models.local.training import Trained, train_clients
from fedveil.models.networks.build import build
from fedveil.models.networks.words import Words
from fedveil.models.vectorized.batched import Chain
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.looped import Looped
from tests.models.test_batched import FEATURES, IMAGES, PAIR, TEXT, Convolution, models

V = 12
NEXT = Task("text", (6,), (), vocabulary_size=V, predicts="next_token")


def examples(task: Task, n: int, seed: int) -> Examples:
    """Made-up examples; words repeat within a text, some texts have none, and some sequences no token to predict."""
    rng = np.random.default_rng(seed)
    if task.kind != "text":
        return Examples(rng.standard_normal((n, *task.shape)), rng.integers(0, len(task.classes), n))
    tokens = task.shape[0]
    ids = rng.integers(1, 9, (n, tokens)).astype(np.int32)
    ids[np.arange(tokens) >= rng.integers(0, tokens + 1, n)[:, None]] = 0
    if task.predicts == "classification":
        return Examples(ids, rng.integers(0, 2, n))
    mask = ids > 0
    mask[0, 0] = True
    return Examples(ids, rng.integers(0, V, (n, tokens)), mask)


def tokens() -> nn.Sequential:
    """A network for next_token that layer rules compute, all positions alike."""
    return nn.Sequential(Words(V, 3), nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, V))


class Own(nn.Sequential):
    """A network that no layer rules are chosen for, as it may do more than its layers."""


class Branching(Convolution):
    """A network that neither rules nor `torch.func` compute."""

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        return found * 2 if found.sum().item() > 0 else found


def slow(
    network: nn.Module,
    start: dict[str, Tensor],
    client: Examples,
    training: Training,
    stream: Stream,
    private: Private,
    moves: set[str] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """DP-SGD as Abadi et al. print it, with one backward for each example; z is that of the only client."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(start[name])
    draws, n = private.draws(stream), len(client)
    expected, deviation = batch_size_of(n, training), float(private.deviations[0])
    trained = [(m, p) for m, p in network.named_parameters() if p.requires_grad and (moves is None or m in moves)]
    own = [p for _, p in trained]
    rate, decay = training.learning_rate, training.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        own, lr=rate, momentum=training.momentum, nesterov=training.nesterov, weight_decay=decay
    )
    if training.optimizer != "sgd":
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(own, lr=rate, weight_decay=decay)
    padding = {
        f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Embedding) and m.padding_idx == 0
    }
    pictures = stream.generator("augmentation")
    total, seen = 0.0, 0
    for batch in poisson_batches(n, rate_of(n, training), steps_of(n, training), draws.uniform):
        sums = [torch.zeros_like(p) for p in own]
        chosen = torch.from_numpy(client.features[batch])
        if training.shift and len(batch):
            chosen = augment(chosen, training, pictures)
        for x, i in zip(chosen, batch, strict=True):
            mask = None if client.mask is None else torch.from_numpy(client.mask[i : i + 1])
            x = x.unsqueeze(0) if x.is_floating_point() else x.unsqueeze(0).long()
            value = loss(network(x), torch.from_numpy(client.labels[i : i + 1]), training.loss, mask)
            found = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in found))
            if math.isfinite(norm):
                predictions = 1 if mask is None else int(mask.sum())
                total, seen = total + float(value.detach()) * predictions, seen + predictions
                for kept, gradient in zip(sums, found, strict=True):
                    kept += gradient * (1.0 if norm == 0 else min(1.0, private.clip / norm))
        if deviation:
            drawn, at = draws.normal(sum(p.numel() for p in own)), 0
            for (name, _), kept in zip(trained, sums, strict=True):
                part = torch.from_numpy(drawn[at : at + kept.numel()]).double().view_as(kept)
                at += kept.numel()
                kept += deviation * private.clip * part
                if name in padding:
                    kept[0] = 0.0
        for (name, p), kept in zip(trained, sums, strict=True):
            p.grad = kept / expected + training.proximal_mu * (p.detach() - start[name])
        optimizer.step()
    return {name: p.detach().clone() for name, p in network.named_parameters()}, total / max(seen, 1)


def both_ways(
    network: nn.Module,
    task: Task,
    sizes: list[int],
    training: Training,
    *,
    clip: float = 0.5,
    deviation: float = 0.0,
    moves: set[str] | None = None,
) -> tuple[Trained, type]:
    """All clients at once, if the network can, and one by one, against the slow way; return the first, and its kind."""
    network.double().train()
    start = weights.get(network)
    clients = [examples(task, n, seed) for seed, n in enumerate(sizes)]
    streams = [Stream(3, 1, client) for client in range(len(sizes))]
    private = Private(clip, np.full(len(sizes), deviation), seeded)
    probe = torch.from_numpy(clients[0].features[:3])
    how = private_way(network, probe if probe.is_floating_point() else probe.long())
    assert type(private_way(network, made_up(network, clients[0].features))) is type(how)  # which has seen no example
    arguments = (network, start, clients, training, training.learning_rate, streams)
    alone = train_clients(*arguments, classes=max(task.labels, 2), private=private, moves=moves)
    found = alone
    if not isinstance(how, Looped):
        found = train_clients(*arguments, classes=max(task.labels, 2), private=private, moves=moves, together=how)
    for k, (client, stream) in enumerate(zip(clients, streams, strict=True)):
        wanted, value = slow(network, start, client, training, stream, private.of([k]), moves)
        for name, tensor in wanted.items():
            for made in (found, alone):
                torch.testing.assert_close(made.parameters[name][k], tensor, rtol=1e-8, atol=1e-9, msg=f"{name} of {k}")
        assert found.loss[k] == pytest.approx(value, rel=1e-7, abs=1e-12)
        assert found.steps[k] == steps_of(len(client), training)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(start[name])
    return found, type(how)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    optimizer = draw(st.sampled_from(["sgd", "sgd", "adam", "adamw"]))
    momentum = draw(st.sampled_from([0.0, 0.9])) if optimizer == "sgd" else 0.0
    return Training(
        epochs=draw(st.integers(1, 2)),
        steps=draw(st.sampled_from([None, 1, 4])),
        batch_size=draw(st.sampled_from([1, 3, 8, "full"])),
        learning_rate=draw(st.sampled_from([0.05, 0.5])) if optimizer == "sgd" else 0.01,
        optimizer=optimizer,
        momentum=momentum,
        nesterov=draw(st.booleans()) if momentum else False,
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        loss=draw(st.sampled_from(["cross_entropy", "squared_error"])),
        proximal_mu=draw(st.sampled_from([0.0, 0.3])),
    )


@settings(max_examples=40, deadline=None)
@given(
    models().filter(lambda model: not model[1].settings.dropout if hasattr(model[1].settings, "dropout") else True),
    trainings(),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([0.01, 0.5, math.inf]),
    st.integers(0, 99),
)
def test_every_network_of_layers_is_the_slow_way(model, training, sizes, clip, seed):
    """Clients of different sizes, in batches that are empty at times, with every optimiser, layer, pooling and loss."""
    task, settings_ = model
    network = build(task, settings_, Stream(seed))
    _, how = both_ways(network, task, sizes, training, clip=clip, deviation=0.7 if clip < math.inf else 0.0)
    assert how is Chain


@pytest.mark.parametrize(
    ("make", "task", "kind"),
    [
        (tokens, NEXT, Chain),
        (lambda: Own(*tokens()), NEXT, Functional),
        (Convolution, IMAGES, Functional),
        (lambda: nn.Sequential(nn.Embedding(50, 3, padding_idx=0), nn.Flatten(), nn.Linear(24, 2)), TEXT, Functional),
        (lambda: nn.Sequential(nn.Embedding(V, 3), nn.Linear(3, V)), NEXT, Functional),
        (Branching, IMAGES, Looped),
        (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.GELU(), nn.Linear(5, 3)), FEATURES, Functional),
        (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)), PAIR, Chain),
    ],
    ids=[
        "tokens",
        "layer norm",
        "convolution",
        "words of its own",
        "tokens of its own",
        "branching",
        "gelu",
        "one logit",
    ],
)
def test_networks_of_ones_own_are_the_slow_way(make, task, kind, monkeypatch):
    """By layer rules where there are any, else by `torch.func` in several blocks, else one after another."""
    monkeypatch.setattr("fedveil.models.vectorized.functional.BLOCK", 700)
    torch.manual_seed(2)
    training = Training(epochs=2, batch_size=3, learning_rate=0.3, momentum=0.5, weight_decay=0.01)
    _, how = both_ways(make(), task, [7, 1, 4], training, clip=0.3, deviation=0.5)
    assert how is kind


@pytest.mark.parametrize(
    "model",
    [
        Model(name="bag", embedding=4, pooling="mean"),
        Model(name="bag", embedding=1, pooling="sum"),
        Model(name="mlp", embedding=4, pooling="sum", hidden=(5,)),
        Model(name="lstm", embedding=4, units=3, pooling="mean"),
        Model(name="lstm", embedding=4, units=3, pooling="last"),
    ],
    ids=["bag, mean", "bag, sum", "mlp", "lstm, mean", "lstm, last"],
)
def test_a_word_that_occurs_twice_counts_as_one_weight(model):
    """Its gradients add up before the norm is taken: texts of four tokens from two words, every gradient clipped."""
    task = replace(TEXT, shape=(4,))
    network = build(task, model, Stream(1)).double()
    rng = np.random.default_rng(4)
    ids = rng.integers(1, 3, (9, 4)).astype(np.int32)
    ids[np.arange(4) >= rng.integers(1, 5, 9)[:, None]] = 0
    client, stream, start = Examples(ids, rng.integers(0, 2, 9)), Stream(1), weights.get(network)
    training, private = Training(batch_size="full", steps=1, learning_rate=1.0), Private(0.01, np.zeros(1), seeded)
    found = train_clients(network, start, [client], training, 1.0, [stream], classes=2, private=private)
    wanted, _ = slow(network, start, client, training, stream, private)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.parameters[name][0], tensor, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize(("units", "tokens"), [(1, 40), (16, 3)], ids=["by gradients", "by pairs"])
def test_both_ways_to_a_sequences_norm(units, tokens, block, monkeypatch):
    """Long texts and few units make the gradients, short ones multiply pairs of positions; in any number of blocks."""
    monkeypatch.setattr("fedveil.models.vectorized.norms.BLOCK", block)
    task = replace(TEXT, shape=(tokens,))
    network = build(task, Model(name="lstm", units=units, embedding=units, layers=2), Stream(1))
    both_ways(network, task, [5, 3], Training(batch_size=4, learning_rate=0.5), clip=0.05)


def test_a_norm_is_not_too_small_where_positions_cancel():
    """Two positions, equal and opposite but for the last bits: pairs give no norm below that of the gradient."""
    from fedveil.models.vectorized.norms import sequence_squares

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((200, 1, 64)).astype(np.float32)).expand(200, 2, 64)
    s = torch.from_numpy(rng.standard_normal((200, 1, 64)).astype(np.float32))
    slopes = torch.cat([1000 * s, -1000.01 * s], 1)
    wanted = torch.bmm(slopes.double().transpose(1, 2), x.double()).square().sum((1, 2))
    found = sequence_squares(x, slopes)
    assert (found >= wanted * (1 - 1e-5)).all()


@pytest.mark.parametrize("kind", ["rules", "torch.func", "loop"])
def test_weights_that_do_not_move_count_in_no_norm_and_get_no_noise(kind):
    torch.manual_seed(1)
    training = Training(batch_size=3, learning_rate=0.5)
    if kind == "rules":
        network: nn.Module = build(TEXT, Model(name="lstm", units=4, embedding=3), Stream(1))
        moves = {"lstm.weight_hh_l0", "lstm.bias_ih_l0", "output.bias"}
        found, how = both_ways(network, TEXT, [6, 4], training, clip=0.1, deviation=0.5, moves=moves)
    else:
        network = Convolution() if kind == "torch.func" else Branching()
        moves = {"output.weight", "convolve.bias"}
        found, how = both_ways(network, IMAGES, [6, 4], training, clip=0.1, deviation=0.5, moves=moves)
    assert how is {"rules": Chain, "torch.func": Functional, "loop": Looped}[kind]
    for name, tensor in weights.get(network).items():
        assert torch.equal(found.parameters[name][0], tensor) == (name not in moves)


def test_without_noise_and_bound_a_step_of_all_examples_is_that_of_plain_sgd():
    network = build(IMAGES, Model(hidden=(5,), activation="tanh"), Stream(1)).double()
    clients, streams = [examples(IMAGES, n, n) for n in (9, 4)], [Stream(1, 0, 0), Stream(1, 0, 1)]
    arguments = (network, weights.get(network), clients, Training(batch_size="full", epochs=3), 0.5, streams)
    plain = train_clients(*arguments, classes=3)
    found = train_clients(*arguments, classes=3, private=Private(math.inf, np.zeros(2), seeded))
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-12)


@pytest.mark.parametrize("extra", [{"shift": 1, "rotation": 20.0, "noise": 0.1}, {"shift": 1}])
def test_augmentation_changes_each_example_by_the_clients_own_stream(extra):
    network = build(IMAGES, Model(hidden=(5,), activation="tanh"), Stream(1))
    if "noise" in extra:
        training = Training(epochs=2, batch_size=4, **extra)
        clients, streams = [examples(IMAGES, n, n) for n in (9, 4)], [Stream(1, 0, 0), Stream(1, 0, 1)]
        clients = [Examples(c.features.astype(np.float32), c.labels) for c in clients]
        arguments = (network, weights.get(network), clients, training, 0.5, streams)
        private = Private(0.5, np.ones(2), seeded)
        way = private_way(network, torch.from_numpy(clients[0].features))
        alone = train_clients(*arguments, classes=3, private=private)
        found = train_clients(*arguments, classes=3, private=private, together=way)
        for name, tensor in alone.parameters.items():
            torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-4, atol=1e-5)
    else:
        both_ways(network, IMAGES, [9, 4], Training(epochs=2, batch_size=4, **extra))


@pytest.mark.parametrize("most", [1, 3, 4096])
def test_dropout_does_not_depend_on_the_other_clients(most, monkeypatch):
    """Nor on how many of them have an empty batch, or one that is cut into pieces."""
    monkeypatch.setattr(private_module, "MOST", most)
    network = build(FEATURES, Model(hidden=(9, 9), dropout=0.5), Stream(1)).double()
    clients, streams = [examples(FEATURES, n, n) for n in (7, 2, 30)], [Stream(1, 0, k) for k in range(3)]
    way = private_way(network, torch.from_numpy(clients[0].features))
    arguments = (network, weights.get(network), clients, Training(epochs=2, batch_size=2), 0.5, streams)
    private = Private(0.5, np.array([0.5, 0.0, 1.0]), seeded)
    alone = train_clients(*arguments, classes=3, private=private)
    found = train_clients(*arguments, classes=3, private=private, together=way)
    for name, tensor in alone.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_long_batches_are_cut_into_pieces_with_the_same_sum(most, monkeypatch):
    monkeypatch.setattr(private_module, "MOST", most)
    network = build(FEATURES, Model(hidden=(5,)), Stream(1))
    both_ways(network, FEATURES, [20, 3, 11], Training(batch_size="full", epochs=2, learning_rate=0.5), deviation=0.3)


@pytest.mark.parametrize("kind", ["rules", "dropout", "torch.func", "loop"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_an_example_without_a_finite_norm_adds_nothing(kind, bad):
    """Whatever a client's data are, the others' and its own good examples count as they would without the bad ones."""
    task, network = IMAGES, {"torch.func": Convolution, "loop": Branching}.get(kind, lambda: None)()
    torch.manual_seed(0)
    if network is None:
        network = build(IMAGES, Model(hidden=(5,), dropout=0.4 if kind == "dropout" else 0.0), Stream(1))
    network.double()
    clients = [examples(task, n, n) for n in (6, 5, 4)]
    for i in (0, 3):
        clients[1].features[i] = bad
    clients[2].features[:] = bad
    streams, private = [Stream(1, 0, k) for k in range(3)], Private(0.5, np.zeros(3), seeded)
    training = Training(batch_size="full", steps=2, learning_rate=0.5)
    start = weights.get(network)
    arguments = (network, start, clients, training, 0.5, streams)
    alone = train_clients(*arguments, classes=3, private=private)
    if kind != "loop":
        way = private_way(network, torch.from_numpy(clients[0].features))
        found = train_clients(*arguments, classes=3, private=private, together=way)
        for name, tensor in alone.parameters.items():
            torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-12, atol=1e-12)
    for name, tensor in alone.parameters.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor[2], start[name]) or bad == 1e200  # which, well predicted, has a gradient of 0
    if kind not in ("dropout", "loop"):
        wanted, _ = slow(network, start, clients[1], training, streams[1], private.of([1]))
        for name, tensor in wanted.items():
            torch.testing.assert_close(alone.parameters[name][1], tensor, rtol=1e-8, atol=1e-9)
    assert np.isfinite(alone.loss).all()
    assert alone.loss[2] == 0 or bad == 1e200


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.25, 0.6])
def test_batches_are_drawn_by_independent_coins(rate, monkeypatch):
    """Each example, each pair of neighbours and each size comes as often as coins give it; chi-square, p > 1e-4."""
    monkeypatch.setattr(private_module, "COINS", 100)  # so that steps are drawn in many blocks
    n, times, rng = 60, 6000, np.random.default_rng(int(rate * 1000))
    drawn = np.zeros((times, n), bool)
    for row, batch in zip(drawn, poisson_batches(n, rate, times, rng.random), strict=True):
        assert (np.diff(batch) > 0).all()
        row[batch] = True
    spread = ((drawn.sum(0) - times * rate) ** 2).sum() / (times * rate * (1 - rate))
    assert stats.chi2.sf(spread, n) > 1e-4
    for pairs in (drawn[:, 1:] & drawn[:, :-1], drawn[1:] & drawn[:-1]):  # neighbours in a step, and in the next one
        row = pairs.shape[1] if len(pairs) == times else len(pairs)
        variance = row * rate**2 * (1 - rate**2) + 2 * (row - 1) * (rate**3 - rate**4)
        off = (pairs.sum() - pairs.size * rate**2) / math.sqrt(variance * pairs.size / row)
        assert abs(off) < 5 or pairs.size * rate**2 < 5
    sizes = np.bincount(drawn.sum(1), minlength=n + 1)
    wanted = times * stats.binom.pmf(np.arange(n + 1), n, rate)
    common = wanted > 5
    found, rest = sizes[common], sizes[~common].sum()
    assert stats.chisquare([*found, rest], [*wanted[common], times - wanted[common].sum()]).pvalue > 1e-4


def test_a_batch_may_be_empty_and_its_step_is_noise_alone():
    network = nn.Sequential(nn.Linear(6, 3)).double()
    start = weights.get(network)
    stream, training = Stream(1), Training(batch_size=1, steps=1, learning_rate=1.0)
    private = Private(0.5, np.array([2.0]), lambda stream: replace(seeded(stream), uniform=np.ones))
    with np.errstate(divide="ignore"):
        trained = train_clients(
            network, start, [examples(FEATURES, 900, 1)], training, 1.0, [stream], classes=3, private=private
        )
    drawn = seeded(stream).normal(21).astype(np.float64)
    for name, part in (("0.weight", drawn[:18].reshape(3, 6)), ("0.bias", drawn[18:])):
        step = start[name].double().numpy() - part
        np.testing.assert_allclose(trained.parameters[name][0].numpy(), step, rtol=1e-12)
    assert trained.loss[0] == 0


def test_every_trained_number_gets_the_declared_noise():
    """Of the deviation z C / (expected batch size) of each client, in words as well that no text has; not padding."""
    network = build(TEXT, Model(name="bag", embedding=200), Stream(1))
    clients = [examples(TEXT, 10, 1), examples(TEXT, 4, 2)]
    start = weights.get(network)
    training = Training(batch_size=5, steps=1, learning_rate=1.0)
    streams = [Stream(1, 0, 0), Stream(1, 0, 1)]
    arguments = (network, start, clients, training, 1.0, streams)
    runs = [
        train_clients(*arguments, classes=2, private=Private(0.1, z, seeded))
        for z in (np.array([30.0, 7.0]), np.zeros(2))
    ]
    for k, deviation in ((0, 30 * 0.1 / 5), (1, 7 * 0.1 / 4)):
        noise = torch.cat([(runs[0].parameters[m][k] - runs[1].parameters[m][k]).flatten() for m in start])[200:]
        assert stats.kstest(noise.numpy() / deviation, "norm").pvalue > 1e-4
        assert abs(float(noise.std()) / deviation - 1) < 5 / math.sqrt(2 * len(noise))
        assert (runs[0].parameters["embedding.weight"][k, 0] == 0).all()


def test_randomness_is_asked_for_anew_by_each_training_and_seeded_randomness_repeats():
    asked: list[Stream] = []

    def draws(stream: Stream) -> Draws:
        asked.append(stream)
        return seeded(stream)

    network = build(FEATURES, Model(hidden=(5,)), Stream(1))
    streams = [Stream(1, 0, 0), Stream(1, 0, 1)]
    clients = [examples(FEATURES, n, n) for n in (9, 5)]
    clients = [Examples(c.features.astype(np.float32), c.labels) for c in clients]
    arguments = (network, weights.get(network), clients, Training(batch_size=4), 0.5, streams)
    private = Private(0.1, np.ones(2), draws)
    first, second = (train_clients(*arguments, classes=3, private=private) for _ in range(2))
    assert asked == streams * 2
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name])
        assert not torch.equal(tensor[0], tensor[1])


def test_batch_norm_is_refused_as_it_mixes_examples():
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    with pytest.raises(SettingsError, match="layer '1' normalises by the other examples"):
        private_way(network, torch.rand(3, 6))
    client = examples(FEATURES, 5, 1)
    client = Examples(client.features.astype(np.float32), client.labels)
    private = Private(1.0, np.ones(1), seeded)
    with pytest.raises(SettingsError, match="GroupNorm"):
        train_clients(network, weights.get(network), [client], Training(), 0.1, [Stream(1)], classes=3, private=private)


def test_clipping_a_batchs_gradient_besides_is_refused():
    network, client = nn.Sequential(nn.Linear(6, 3)), examples(FEATURES, 5, 1)
    with pytest.raises(SettingsError, match=r"training\.max_grad_norm = 1\.0: .* remove"):
        train_clients(
            network, weights.get(network), [client], Training(max_grad_norm=1.0), 0.1, [Stream(1)], classes=3,
            private=Private(1.0, np.ones(1), seeded),
        )  # fmt: skip


def test_a_correction_is_added_to_the_noised_gradient():
    """SCAFFOLD's shift is no example's gradient: it is not clipped, and counts in no norm."""
    network = build(FEATURES, Model(hidden=()), Stream(1)).double()
    start, client = weights.get(network), examples(FEATURES, 6, 1)
    training = Training(batch_size=3, steps=2)
    shift = {name: torch.full_like(tensor, 7.0) for name, tensor in start.items()}
    arguments = (network, start, [client], training, 0.5, [Stream(1)])
    private = Private(1e-9, np.zeros(1), seeded)
    found = train_clients(*arguments, classes=3, correction=Correction(shift=shift), private=private)
    for name, tensor in start.items():
        torch.testing.assert_close(found.parameters[name][0], tensor - 7.0, rtol=0, atol=1e-8)
