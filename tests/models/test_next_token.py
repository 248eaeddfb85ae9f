"""Predicting each next token: losses, training and evaluation count the positions of the masks, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples, Task
from fedveil.core.metrics import MetricSet, Scores, merge
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.batches import orders
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.losses import loss, losses_and_slopes
from fedveil.models.local.training import Trained, train_clients
from fedveil.models.networks.build import example
from fedveil.models.networks.words import Words
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.functional import Functional

V, T = 11, 6
TASK = Task("text", (T,), (), V, "next_token")
METRICS = MetricSet.of(TASK)


class Recurrent(nn.Module):
    """A user's own language model, which has no layer rules."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words(V, 4)
        self.mix = nn.Linear(8, 5)
        self.output = nn.Linear(5, V)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.words(ids)  # [n, t, 4]
        before = nn.functional.pad(vectors[:, :-1], (0, 0, 1, 0))
        found: Tensor = self.output(torch.tanh(self.mix(torch.cat([vectors, before], -1))))
        return found


def chained() -> nn.Module:
    return nn.Sequential(
        Words(V, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.PReLU(), nn.Dropout(0.3), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, V)
    )  # fmt: skip


def tokens(n: int, seed: int, empty: bool = True) -> Examples:
    """Random tokens, padded behind their lengths, with random masks; labels of positions that do not count are nonsense."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, V, (n, T)).astype(np.int32)
    lengths = rng.integers(0 if empty else 1, T + 1, n)
    words = np.arange(T) < lengths[:, None]
    ids[~words] = 0
    mask = words & (rng.random((n, T)) < 0.8)
    if not empty:
        mask[:, 0] = True
    return Examples(ids, rng.integers(0, V, (n, T)), mask)


def slow(network: nn.Module, client: Examples, training: Training, stream: Stream) -> tuple[dict[str, Tensor], float]:
    """Plain SGD by autograd, position by position, in Python: the weights, and the mean loss a token."""
    own = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    size = len(client) if training.batch_size == "full" else training.batch_size
    total, count = 0.0, 0
    for order in orders(len(client), training, [stream])[0]:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            outputs = torch.func.functional_call(network, own, (torch.from_numpy(client.features[batch]).long(),))
            said = [
                -outputs[i, j].log_softmax(-1)[int(client.labels[row, j])]
                for i, row in enumerate(batch)
                for j in range(T)
                if client.mask is not None and client.mask[row, j]
            ]
            if not said:
                continue  # nothing to learn from
            value = torch.stack(said).mean()
            total, count = total + float(value.detach()) * len(said), count + len(said)
            slopes = torch.autograd.grad(value, list(own.values()))
            for (name, weight), slope in zip(list(own.items()), slopes, strict=True):
                own[name] = (weight - training.learning_rate * slope).detach().requires_grad_()
    return own, total / count


def trained(network: nn.Module, clients: list[Examples], training: Training) -> tuple[Trained, Trained]:
    """One by one, and all at once."""
    how = batched(network, example(TASK))
    assert not isinstance(how, str), how
    streams = [Stream(7, 3, k) for k in range(len(clients))]
    arguments = (network, weights.get(network), clients, training, training.learning_rate, streams)
    return train_clients(*arguments, classes=V), train_clients(*arguments, classes=V, together=how)


def assert_same(found: Trained, wanted: Trained) -> None:
    for name, tensor in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.steps, wanted.steps)


@st.composite
def cohorts(draw: st.DrawFn) -> list[Examples]:
    """Clients of different sizes, whose examples and even batches may have no position that counts."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    clients = [tokens(n, draw(st.integers(0, 999))) for n in sizes]
    for client in clients:
        assert client.mask is not None
        client.mask[0, 0] = True
    return clients


OPTIMIZERS = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adam", "learning_rate": 0.01},
    {"proximal_mu": 0.3, "max_grad_norm": 0.1},
]


@pytest.mark.parametrize(("make", "kind"), [(chained, Chain), (Recurrent, Functional)], ids=["chain", "functional"])
@settings(max_examples=40, deadline=None)
@given(
    cohort=cohorts(),
    batch_size=st.sampled_from([1, 2, 3, "full"]),
    epochs=st.integers(1, 2),
    extra=st.sampled_from(OPTIMIZERS),
    wanted_loss=st.sampled_from(["cross_entropy", "squared_error"]),
)
def test_all_at_once_is_one_by_one(make, kind, cohort, batch_size, epochs, extra, wanted_loss) -> None:
    torch.manual_seed(1)
    network = make().double()
    assert isinstance(batched(network, example(TASK)), kind)
    options = {"learning_rate": 0.2, "epochs": epochs, "batch_size": batch_size, "loss": wanted_loss}
    alone, together = trained(network, cohort, Training(**(options | extra)))
    assert_same(together, alone)


@settings(max_examples=30, deadline=None)
@given(cohort=cohorts(), batch_size=st.sampled_from([1, 2, 3, "full"]), epochs=st.integers(1, 2))
def test_training_is_a_plain_loop_over_the_positions_that_count(cohort, batch_size, epochs) -> None:
    torch.manual_seed(1)
    network = Recurrent().double()
    training = Training(learning_rate=0.2, epochs=epochs, batch_size=batch_size)
    alone, together = trained(network, cohort, training)
    for k, client in enumerate(cohort):
        own, mean = slow(network, client, training, Stream(7, 3, k))
        for found in (alone, together):
            assert found.loss[k] == pytest.approx(mean, rel=1e-9)
            for name, tensor in own.items():
                torch.testing.assert_close(found.parameters[name][k], tensor.detach(), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.sampled_from(["cross_entropy", "squared_error"]))
def test_the_loss_is_the_mean_over_the_positions_that_count_and_so_is_its_gradient(seed, n, kind) -> None:
    held = tokens(n, seed)
    assert held.mask is not None
    outputs = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, T, V))).requires_grad_()
    labels, mask = torch.from_numpy(held.labels), torch.from_numpy(held.mask)
    value = loss(outputs, labels, kind, mask)
    value.backward()
    each, slopes = losses_and_slopes(outputs.detach(), labels, kind)
    share = mask.double() / max(held.predictions, 1)
    assert float(value.detach()) == pytest.approx(float((each * share).sum()), abs=1e-12)
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, slopes * share.unsqueeze(-1), rtol=1e-9, atol=1e-12)
    assert not outputs.grad[~mask].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 999), st.integers(1, 40))
def test_merged_scores_of_clients_are_those_of_their_tokens_together_in_any_batches(sizes, seed, batch) -> None:
    torch.manual_seed(seed)
    network = Recurrent()
    parts = [tokens(n, seed + k, empty=False) for k, n in enumerate(sizes)]
    whole = Examples(*(np.concatenate(arrays) for arrays in zip(*((p.features, p.labels, p.mask) for p in parts), strict=True)))  # fmt: skip
    found = merge([evaluate(network, None, part, "cross_entropy", batch) for part in parts])
    wanted = evaluate(network, None, whole, "cross_entropy")
    assert (found.examples, found.sums) == (wanted.examples, wanted.sums)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    with torch.no_grad():
        outputs = network(torch.from_numpy(whole.features).long())
    likely = outputs.log_softmax(-1).numpy()[*np.nonzero(whole.mask), whole.labels[whole.mask]]
    right = (outputs.argmax(-1).numpy() == whole.labels)[whole.mask]
    values = METRICS.values(found)
    assert list(values) == ["loss", "accuracy", "perplexity"]
    assert values["perplexity"] == pytest.approx(np.exp(-likely.mean(dtype=np.float64)), rel=1e-5)
    assert values["accuracy"] == right.mean()


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary() -> None:
    network = Recurrent()
    nn.init.zeros_(network.output.weight)
    nn.init.zeros_(network.output.bias)
    scores = evaluate(network, None, tokens(9, 1), "cross_entropy")
    assert METRICS.values(scores)["perplexity"] == pytest.approx(V, rel=1e-6)
    assert math.isinf(METRICS.values(Scores(1, 1000.0, scores.sums))["perplexity"])


def test_labels_outside_the_vocabulary_and_masks_without_a_position_are_errors() -> None:
    network, training = Recurrent(), Training()
    held = tokens(3, 0, empty=False)
    labels = held.labels.copy()
    labels[0, 0], labels[1, 2] = 0, V
    arguments = (training, 0.1, [Stream(1, 1, 4)])
    with pytest.raises(DataError, match="client 4 has labels from 0 to 11; with a vocabulary of 11 they must be from 0 to 10"):  # fmt: skip
        train_clients(
            network, weights.get(network), [Examples(held.features, labels, held.mask)], *arguments, classes=V
        )
    nothing = Examples(held.features, held.labels, np.zeros_like(held.labels, bool))
    with pytest.raises(DataError, match="client 4 has no token to predict"):
        train_clients(network, weights.get(network), [nothing], *arguments, classes=V)
    with pytest.raises(DataError, match="no examples to evaluate on"):
        evaluate(network, None, nothing, "cross_entropy")


def test_a_selection_and_what_is_taken_bring_their_masks() -> None:
    held = tokens(6, 3)
    assert held.mask is not None
    rows = np.array([4, 1])
    for some in (held.take(rows), held.select(rows), held.select(np.arange(6)).select(rows)):
        assert some.mask is not None
        np.testing.assert_array_equal(some.mask, held.mask[rows])
        np.testing.assert_array_equal(some.labels, held.labels[rows])
        assert some.predictions == held.mask[rows].sum()
