"""Metrics of an evaluation.

A metric has a statistic and a value. The statistic is a set of named sums over the predictions of a batch. The value is
computed from the sums of all batches. Sums of batches, clients and groups add up, on one machine as over a network, so
the value is that of all predictions together (Ro, Suresh and Wu 2021, "FedJAX", section 3.3; its core/metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fedveil.core.catalog import METRICS
from fedveil.core.declaration import declaration
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task, check_task, fits

EXAMPLES, TOKENS, LOSS_MEAN = "num-examples", "tokens", "loss"  # their names in messages
Sums = Mapping[str, float]
# (logits [n, classes], [n, 1] or [n, t, vocabulary]; the n examples) -> sums by name
Statistic = Callable[[Tensor, Examples], Sums]


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation; `merge` joins those of several clients.

    loss: mean over the predictions
    sums: the sums of the metrics' statistics, by name
    auc: area under the ROC curve of a binary task; None after a merge, or where one class is missing
    """

    examples: int
    loss: float
    sums: Sums
    auc: float | None = None

    @property
    def predictions(self) -> int:
        """Number of scored predictions: for next_token the positions that count, else one for each example."""
        return int(self.sums.get(TOKENS, self.examples))

    @property
    def accuracy(self) -> float:
        """The share of predictions that equal the label."""
        return self.sums["correct"] / self.predictions


@dataclass(frozen=True)
class Metric:
    """A measure of a model's quality.

    value: computes the metric from the scores of all predictions; None where it is undefined
    statistic: the sums over a batch that the metric needs
    tasks: the tasks that the metric fits (`Task.names`); empty: any
    merges: whether sums are enough to compute it; the AUC needs every prediction, so only one evaluator can compute it
    """

    value: Callable[[Scores], float | None]
    statistic: Statistic
    tasks: tuple[str, ...] = ()
    merges: bool = True


def counts(outputs: Tensor, examples: Examples) -> Sums:
    """Count the correct predictions of a batch; with two classes, also true and false positives and false negatives.

    With more than two classes, the last three are 0. For next_token, they are replaced by the number of predictions.
    """
    if examples.mask is not None:
        right = (outputs.argmax(-1).cpu().numpy() == examples.labels) & examples.mask  # [n, t]
        return {TOKENS: examples.predictions, "correct": int(right.sum())}
    classes, labels = outputs.shape[1], examples.labels
    predicted = (outputs[:, 0] > 0 if classes == 1 else outputs.argmax(1)).cpu().numpy()  # [n]
    binary = classes <= 2
    return {
        "correct": int((predicted == labels).sum()),
        "true-positives": int(((predicted == 1) & (labels == 1)).sum()) if binary else 0,
        "false-positives": int(((predicted == 1) & (labels == 0)).sum()) if binary else 0,
        "false-negatives": int(((predicted == 0) & (labels == 1)).sum()) if binary else 0,
    }


def add(one: Sums, other: Sums) -> Sums:
    """Add two sets of sums by the names of `other`; a name that `one` lacks counts as 0."""
    return {name: one.get(name, 0) + value for name, value in other.items()}


def merge(scores: Sequence[Scores]) -> Scores:
    """Return the scores of all clients' predictions together; those of several clients have no AUC (None).

    Raise DataError where `scores` is empty.
    """
    if not scores:
        raise DataError("there are no scores to merge: no client has evaluated")
    if len(scores) == 1:
        return scores[0]
    predictions = sum(s.predictions for s in scores)
    return Scores(
        examples=sum(s.examples for s in scores),
        loss=sum(s.loss * s.predictions for s in scores) / predictions,
        sums={name: sum(s.sums[name] for s in scores) for name in scores[0].sums},
    )


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the area under the ROC curve; None where one class is missing or a score is NaN.

    It is the probability that a positive scores above a negative, a tie counting half (Mann and Whitney 1947; Hanley
    and McNeil 1982).
    scores: float [n]; positive: bool [n]
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0 or np.isnan(scores).any():
        return None
    _, place, repeats = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(repeats) - (repeats - 1) / 2  # of each distinct score, from 1; ties get their mean rank
    above = ranks[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _precision(scores: Scores) -> float:
    """Return the share of positives among the positive predictions; 0 where there are none."""
    return _share(scores.sums["true-positives"], scores.sums["true-positives"] + scores.sums["false-positives"])


def _recall(scores: Scores) -> float:
    """Return the share of positives that were predicted positive; 0 where there are none."""
    return _share(scores.sums["true-positives"], scores.sums["true-positives"] + scores.sums["false-negatives"])


def _f1(scores: Scores) -> float:
    """Return the harmonic mean of precision and recall; 0 where there are no positives, true or predicted."""
    right = 2 * scores.sums["true-positives"]
    return _share(right, right + scores.sums["false-positives"] + scores.sums["false-negatives"])


def _perplexity(scores: Scores) -> float:
    """Return exp of the mean cross-entropy for each token, in nats; infinite where float64 overflows."""
    return math.exp(scores.loss) if scores.loss < 709 else math.inf


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_BINARY = ("binary classification",)
LOSS = Metric(lambda scores: scores.loss, counts)
ACCURACY = Metric(lambda scores: scores.accuracy, counts)
PRECISION = Metric(_precision, counts, _BINARY)
RECALL = Metric(_recall, counts, _BINARY)
F1 = Metric(_f1, counts, _BINARY)
AUC = Metric(lambda scores: scores.auc, counts, _BINARY, merges=False)
PERPLEXITY = Metric(_perplexity, counts, ("next_token",))


@dataclass(frozen=True)
class MetricSet:
    """The metrics of an experiment, those that fit its task and then the user's, by their names in the record.

    own: the names of the user's metrics
    """

    metrics: Mapping[str, Metric]
    task: Task
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, own: Sequence[str] = (), data: str = "the data") -> MetricSet:
        """Return the metrics that fit `task`, and the user's.

        own: the user's metrics, each as `package.module:function`
        data: the setting that names the data set, for errors
        Raise SettingsError where a metric cannot be imported, does not fit the task, or has the name of another one.
        """
        found = {name: METRICS.load(name, "evaluation.metrics") for name in METRICS}
        metrics = {name: metric for name, metric in found.items() if fits(metric.tasks, task)}
        names = []
        for path in own:
            name, part = path.rpartition(":")[2], f"evaluation.metrics: '{path}'"
            function = METRICS.load(path, "evaluation.metrics")
            if path in METRICS:
                check_task(part, function.tasks, task, data)
                raise SettingsError(f"{part}: is always told for {task}; leave it out")
            if not callable(function):
                raise SettingsError(f"{part}: is a {type(function).__name__}, where a function belongs")
            check_task(part, declaration(function).tasks, task, data)
            if name in METRICS or name in metrics:
                raise SettingsError(f"{part}: another metric is called '{name}'; call the function something else")
            metrics[name] = Metric(partial(_ratio, name), _statistic(name, part, function))
            names.append(name)
        return cls(metrics, task, tuple(names))

    @property
    def names(self) -> list[str]:
        """The names of all metrics, in order."""
        return list(self.metrics)

    @property
    def merged(self) -> list[str]:
        """The names of the metrics that are known after `merge`, in order."""
        return [name for name, metric in self.metrics.items() if metric.merges]

    @property
    def statistics(self) -> list[Statistic]:
        """The statistics of all metrics, each once."""
        return list(dict.fromkeys(metric.statistic for metric in self.metrics.values()))

    @property
    def whole(self) -> dict[str, int]:
        """The integers that an evaluating client reports, each with its least value."""
        if self.task.predicts == "next_token":
            return {EXAMPLES: 1, TOKENS: 1, "correct": 0}
        return {EXAMPLES: 1, **dict.fromkeys(("correct", "true-positives", "false-positives", "false-negatives"), 0)}

    @property
    def numbers(self) -> list[str]:
        """The other numbers that an evaluating client reports."""
        return [LOSS_MEAN, *(f"{name}-{part}" for name in self.own for part in ("total", "count"))]

    def read(self, told: Mapping[str, object]) -> Scores:
        """Return the scores in a client's report, which must hold every one of `whole` and `numbers`, each a number."""
        sums: dict[str, float] = {name: int(told[name]) for name in self.whole}  # type: ignore[call-overload]
        sums |= {name: float(told[name]) for name in self.numbers}  # type: ignore[arg-type]
        return Scores(examples=int(sums.pop(EXAMPLES)), loss=sums.pop(LOSS_MEAN), sums=sums)

    def values(self, scores: Scores) -> dict[str, float]:
        """Return the value of each metric that the scores define, by name."""
        found = {name: metric.value(scores) for name, metric in self.metrics.items()}
        return {name: value for name, value in found.items() if value is not None}


def _statistic(name: str, part: str, function: Statistic) -> Statistic:
    """Return a user's function as a statistic whose sums carry the metric's name.

    part: the setting that names the function, for errors
    """

    def count(outputs: Tensor, examples: Examples) -> Sums:
        try:
            found = function(outputs, examples)
            return {f"{name}-{key}": float(found[key]) for key in ("total", "count")}
        except Exception as error:  # a user's code may raise anything
            raise SettingsError(
                f"{part}: must return two sums over a batch, {{'total': ..., 'count': ...}}; it failed with "
                f"{type(error).__name__}: {error}"
            ) from error

    return count


def _ratio(name: str, scores: Scores) -> float | None:
    """Return a user's metric, total / count; None where the count is 0."""
    total, count = scores.sums[f"{name}-total"], scores.sums[f"{name}-count"]
    return total / count if count else None
