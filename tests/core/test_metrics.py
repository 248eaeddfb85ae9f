"""Metrics: what parts declare is held against the task, and a user's own are told beside the task's."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedveil.core.catalog import METRICS
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task, check_task, fits
from fedveil.core.metrics import MetricSet, merge
from fedveil.models.local.evaluation import evaluate

IMAGES = Task("images", (1, 2, 2), ("a", "b", "c"))
SPAM = Task("text", (4,), ("ham", "spam"), 9)
TOKENS = Task("text", (4,), (), 9, "next_token")


def second_best(outputs: Tensor, examples: Examples) -> dict[str, float]:
    """The share of predictions whose label is among the two likeliest."""
    best = outputs.topk(2, dim=-1).indices.numpy()
    hits = (best == examples.labels[..., None]).any(-1)
    counts = np.ones_like(hits) if examples.mask is None else examples.mask
    return {"total": (hits & counts).sum(), "count": counts.sum()}


@part(tasks=("next_token",))
def of_tokens(outputs: Tensor, examples: Examples) -> dict[str, float]:
    return {"total": 0, "count": 0}


def accuracy(outputs: Tensor, examples: Examples) -> dict[str, float]:
    return {"total": 1, "count": 1}


def wrong(outputs: Tensor, examples: Examples) -> dict[str, float]:
    return {"total": 1}


@pytest.fixture(autouse=True)
def module(monkeypatch) -> None:
    own = ModuleType("own_metrics")
    for metric in (second_best, of_tokens, accuracy, wrong):
        setattr(own, metric.__name__, metric)
    own.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_metrics", own)


def test_a_task_is_told_the_metrics_that_fit_it_in_the_order_of_a_records_columns() -> None:
    assert MetricSet.of(IMAGES).names == ["loss", "accuracy"]
    assert MetricSet.of(SPAM).names == ["loss", "accuracy", "precision", "recall", "f1", "auc"]
    assert MetricSet.of(SPAM).merged == ["loss", "accuracy", "precision", "recall", "f1"]
    assert MetricSet.of(TOKENS).names == ["loss", "accuracy", "perplexity"]
    told = {name for task in (IMAGES, SPAM, TOKENS) for name in MetricSet.of(task).names}
    assert told == set(METRICS)


def test_a_metric_of_ones_own_merges_over_batches_and_clients_for_either_task() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, 3)).astype(np.float32)
    held = Examples(logits, rng.integers(0, 3, 12))
    found = MetricSet.of(IMAGES, ["own_metrics:second_best"])
    network = nn.Sequential(nn.Linear(3, 3))
    parts = [held.take(np.arange(5)), held.take(np.arange(5, 12))]
    scores = merge([evaluate(network, None, some, "cross_entropy", 2, found.statistics) for some in parts])
    outputs = network(torch.from_numpy(logits)).detach().numpy()
    ranks = (-outputs).argsort(1).argsort(1)[np.arange(12), held.labels]
    assert found.values(scores)["second_best"] == (ranks < 2).mean()
    assert found.names[-1] == found.merged[-1] == "second_best"
    words = MetricSet.of(TOKENS, ["own_metrics:second_best", "own_metrics:of_tokens"])
    assert words.numbers == ["loss", "second_best-total", "second_best-count", "of_tokens-total", "of_tokens-count"]


def test_scores_are_read_as_they_were_told_and_what_nobody_asked_for_is_not() -> None:
    found = MetricSet.of(SPAM, ["own_metrics:second_best"])
    scores = found.read({
        "num-examples": 4, "loss": 0.5, "correct": 3.0, "true-positives": 1, "false-positives": 0, "false-negatives": 1,
        "second_best-total": 4, "second_best-count": 4, "tokens": -7, "seconds": 1.0, "client": 2,
    })  # fmt: skip
    assert (scores.examples, scores.predictions, scores.accuracy) == (4, 4, 0.75)
    assert list(scores.sums) == [
        "correct", "true-positives", "false-positives", "false-negatives", "second_best-total", "second_best-count",
    ]  # fmt: skip
    assert found.values(scores)["second_best"] == 1.0


def test_a_metric_that_counted_nothing_is_not_told() -> None:
    found = MetricSet.of(TOKENS, ["own_metrics:of_tokens"])
    scores = found.read({
        "num-examples": 1, "loss": 0.0, "tokens": 4, "correct": 1, "of_tokens-total": 0, "of_tokens-count": 0,
    })  # fmt: skip
    assert found.values(scores) == {"loss": 0.0, "accuracy": 0.25, "perplexity": 1.0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_metrics:of_tokens", "'own_metrics:of_tokens': is for next_token, and the task of data.dataset = 'mine' is classification of text"),
        ("perplexity", "'perplexity': is for next_token, and the task of data.dataset = 'mine' is classification of text"),
        ("f1", "'f1': is always told for classification of text; leave it out"),
        ("own_metrics:accuracy", "another metric is called 'accuracy'"),
        ("own_metrics:number", "is a int, where a function belongs"),
        ("own_metrics:missing", "'own_metrics:missing' cannot be loaded"),
        ("perplexitty", "no metric is called 'perplexitty'; did you mean 'perplexity'"),
    ],
)  # fmt: skip
def test_a_metric_that_cannot_be_told_is_refused(name, words) -> None:
    with pytest.raises(SettingsError) as refused:
        MetricSet.of(SPAM, [name], "data.dataset = 'mine'")
    assert words in str(refused.value)


def test_a_metric_that_does_not_give_two_sums_says_which_and_how() -> None:
    found = MetricSet.of(IMAGES, ["own_metrics:wrong"])
    with pytest.raises(
        SettingsError, match=r"'own_metrics:wrong': must return two sums over a batch.*KeyError: 'count'"
    ):
        evaluate(nn.Linear(2, 3), None, Examples(np.zeros((1, 2), np.float32), np.zeros(1, np.int64)), "cross_entropy", statistics=found.statistics)  # fmt: skip


def test_a_part_fits_the_tasks_it_declares_and_any_where_it_declares_none() -> None:
    assert fits((), TOKENS)
    assert fits(("classification",), IMAGES)
    assert fits(("classification of text", "next_token"), SPAM)
    assert fits(("classification of text", "next_token"), TOKENS)
    assert fits(("binary classification",), SPAM)
    assert not fits(("binary classification",), IMAGES)
    assert not fits(("binary classification",), Task("text", (4,), (), 2, "next_token"))
    with pytest.raises(SettingsError, match=r"model.name = 'x': is for next_token or a, and the task of the data is classification of images"):  # fmt: skip
        check_task("model.name = 'x'", ("next_token", "a"), IMAGES)
