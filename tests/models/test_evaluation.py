"""Scores against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples, Task
from fedveil.core.metrics import MetricSet, Scores, auc, merge
from fedveil.models.local.evaluation import evaluate

RNG = np.random.default_rng(0)
BINARY = MetricSet.of(Task("features", (2,), ("ham", "spam")))


class Echo(nn.Module):
    """Gives its input as logits, so that a test chooses them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def scored(logits: np.ndarray, labels: np.ndarray, batch: int = 1000) -> Scores:
    return evaluate(Echo(), None, Examples(logits.astype(np.float32), labels), "cross_entropy", batch)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auc_is_scikit_learns_with_ties_and_unknown_with_one_class(pairs: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([s / 2 for s, _ in pairs]), np.array([p for _, p in pairs])
    found = auc(scores, positive)
    if positive.all() or not positive.any():
        assert found is None
    else:
        assert found == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_auc_of_scores_that_are_not_numbers_is_unknown() -> None:
    assert auc(np.array([0.1, np.nan]), np.array([True, False])) is None


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 25), outputs=st.integers(1, 4), batch=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_scores_are_scikit_learns(n: int, outputs: int, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(outputs, 2), n)
    logits = rng.integers(-4, 5, (n, outputs)) / 2.0
    found = scored(logits, labels, batch)
    both = np.hstack([np.zeros((n, 1)), logits]) if outputs == 1 else logits
    probabilities = np.exp(both) / np.exp(both).sum(1, keepdims=True)
    predicted = both.argmax(1)
    assert found.examples == n
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    expected = metrics.log_loss(labels, probabilities, labels=range(both.shape[1]))
    assert found.loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if outputs <= 2:
        values = BINARY.values(found)
        assert values["precision"] == pytest.approx(metrics.precision_score(labels, predicted, zero_division=0))
        assert values["recall"] == pytest.approx(metrics.recall_score(labels, predicted, zero_division=0))
        assert values["f1"] == pytest.approx(metrics.f1_score(labels, predicted, zero_division=0))
        if len(set(labels.tolist())) == 2:
            score = both[:, 1] - both[:, 0]
            assert found.auc == pytest.approx(metrics.roc_auc_score(labels, score), abs=1e-12)
        else:
            assert found.auc is None
    else:
        assert [*found.sums.values()][1:] == [0, 0, 0]
        assert found.auc is None


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_merged_scores_are_those_of_all_examples_together(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(sum(sizes), 2)), rng.integers(0, 2, sum(sizes))
    whole, cuts = scored(logits, labels), np.cumsum(sizes)[:-1]
    parts = [scored(x, y) for x, y in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)]
    merged = merge(parts)
    assert merged.loss == pytest.approx(whole.loss)
    assert merged.auc == (whole.auc if len(sizes) == 1 else None)
    assert (merged.examples, merged.sums) == (whole.examples, whole.sums)


def test_metrics_of_two_classes_have_more_names_and_leave_out_an_unknown_auc() -> None:
    counted = {"correct": 3, "true-positives": 1, "false-positives": 1, "false-negatives": 0}
    two = Scores(4, 0.5, counted, 0.75)
    three = MetricSet.of(Task("features", (2,), ("a", "b", "c")))
    assert three.values(two) == {"loss": 0.5, "accuracy": 0.75}
    assert BINARY.values(two) == {
        "loss": 0.5,
        "accuracy": 0.75,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "auc": 0.75,
    }
    assert "auc" not in BINARY.values(merge([two, two]))


def test_nothing_to_evaluate_or_merge_is_an_error() -> None:
    with pytest.raises(DataError, match="no examples to evaluate on"):
        scored(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="no scores to merge"):
        merge([])


def test_evaluating_leaves_the_network_and_the_random_state_alone() -> None:
    class Drawing(Echo):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x * self.scale + torch.rand(())

    network = Drawing()
    examples = Examples(RNG.random((5, 3), dtype=np.float32), RNG.integers(0, 3, 5))
    state = torch.get_rng_state()
    other = {"scale": torch.tensor([3.0])}
    first, again = (evaluate(network, other, examples, "cross_entropy") for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert float(network.scale.detach()) == 1.0
    assert float(other["scale"]) == 3.0


def test_given_weights_are_the_ones_evaluated() -> None:
    examples = Examples(RNG.normal(size=(9, 3)).astype(np.float32), RNG.integers(0, 3, 9))
    scaled = Examples(examples.features * 3, examples.labels)
    tripled = evaluate(Echo(), {"scale": torch.tensor([3.0])}, examples, "squared_error")
    assert tripled == evaluate(Echo(), None, scaled, "squared_error")
    with pytest.raises(DataError, match="'scale' is missing in the weights"):
        evaluate(Echo(), {}, examples, "squared_error")


def test_read_only_examples_are_evaluated_without_a_warning() -> None:
    features = np.zeros((4, 2), dtype=np.float32)
    features.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scored(features, np.array([0, 0, 1, 0])).accuracy == 0.75
