"""What an evaluation counts, and the numbers that are read off it.

A metric is a statistic and a value: the statistic is named sums over the predictions of a batch, and the value is read off
the sums of all. Sums of batches, clients and groups add up, on one machine as over a network, so that the value is that of
all predictions together (Ro, Suresh and Wu 2021, "FedJAX", section 3.3; its core/metrics.py).
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

EXAMPLES, TOKENS, LOSS_MEAN = "num-examples", "tokens", "loss"  # as they are called on the wire
Sums = Mapping[str, float]
# (logits [n, classes], [n, 1] or [n, t, vocabulary]; the n examples) -> sums by name
Statistic = Callable[[Tensor, Examples], Sums]


@dataclass(frozen=True)
class Scores:
    """What an evaluation counted; scores of several clients make one with `merge`.

    loss: mean over the predictions
    sums: of the metrics' statistics, by name
    auc: area under the ROC curve of a binary task; None after a merge, or where one class is missing
    """

    examples: int
    loss: float
    sums: Sums
    auc: float | None = None

    @property
    def predictions(self) -> int:
        """How many predictions were scored: of next_token the positions that count, else one an example."""
        return int(self.sums.get(TOKENS, self.examples))

    @property
    def accuracy(self) -> float:
        """The share of predictions that name the label."""
        return self.sums["correct"] / self.predictions


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    value: reads it off the scores of all predictions; None where they do not tell it
    statistic: what is counted of each batch
    tasks: the tasks it fits, as parts declare them
    merges: whether sums tell it; one that needs every prediction is known only to who made them all
    """

    value: Callable[[Scores], float | None]
    statistic: Statistic
    tasks: tuple[str, ...] = ()
    merges: bool = True


def counts(outputs: Tensor, examples: Examples) -> Sums:
    """Count the predictions that name the label; of two classes also where the second was predicted, rightly or not.

    With more classes than two, the counts of the second are 0; next_token has none, but the number of its predictions.
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
    """The sums of the predictions of both."""
    return {name: one.get(name, 0) + value for name, value in other.items()}


def merge(scores: Sequence[Scores]) -> Scores:
    """The scores of all clients' predictions together; of several, the AUC is not known (None).

    Raises DataError where there are none.
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
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947; Hanley and McNeil 1982).

    scores: float [n]; positive: bool [n]. None where one class is missing or a score is not a number.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0 or np.isnan(scores).any():
        return None
    _, place, repeats = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(repeats) - (repeats - 1) / 2  # of each distinct score, from 1; ties share their mean rank
    above = ranks[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _precision(scores: Scores) -> float:
    """The share of positives among those predicted positive; 0 where none was."""
    return _share(scores.sums["true-positives"], scores.sums["true-positives"] + scores.sums["false-positives"])


def _recall(scores: Scores) -> float:
    """The share of positives that were predicted positive; 0 where there are none."""
    return _share(scores.sums["true-positives"], scores.sums["true-positives"] + scores.sums["false-negatives"])


def _f1(scores: Scores) -> float:
    """The harmonic mean of precision and recall; 0 where there are no positives, true or predicted."""
    right = 2 * scores.sums["true-positives"]
    return _share(right, right + scores.sums["false-positives"] + scores.sums["false-negatives"])


def _perplexity(scores: Scores) -> float:
    """The exponential of the mean loss a token, where the loss is the cross-entropy in nats; infinite beyond float64."""
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
    """The metrics of an experiment, by name: all that fit its task, then a user's own, as columns of a record name them."""

    metrics: Mapping[str, Metric]
    task: Task
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, own: Sequence[str] = (), data: str = "the data") -> MetricSet:
        """The metrics that fit `task`, and those of a user, each named `package.module:function`.

        data: the setting that names the data set, for errors
        Raises SettingsError where one cannot be loaded, is not for the task, or is called as another is.
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
        """All metrics, in order."""
        return list(self.metrics)

    @property
    def merged(self) -> list[str]:
        """Those that clients' scores together tell, in order."""
        return [name for name, metric in self.metrics.items() if metric.merges]

    @property
    def statistics(self) -> list[Statistic]:
        """What is counted of each batch, each once."""
        return list(dict.fromkeys(metric.statistic for metric in self.metrics.values()))

    @property
    def whole(self) -> dict[str, int]:
        """The whole numbers that an evaluating client tells, and the least of each."""
        if self.task.predicts == "next_token":
            return {EXAMPLES: 1, TOKENS: 1, "correct": 0}
        return {EXAMPLES: 1, **dict.fromkeys(("correct", "true-positives", "false-positives", "false-negatives"), 0)}

    @property
    def numbers(self) -> list[str]:
        """The other numbers that an evaluating client tells."""
        return [LOSS_MEAN, *(f"{name}-{part}" for name in self.own for part in ("total", "count"))]

    def read(self, told: Mapping[str, object]) -> Scores:
        """The scores that a client told; every one of `whole` and `numbers` must be there, and be a number."""
        sums: dict[str, float] = {name: int(told[name]) for name in self.whole}  # type: ignore[call-overload]
        sums |= {name: float(told[name]) for name in self.numbers}  # type: ignore[arg-type]
        return Scores(examples=int(sums.pop(EXAMPLES)), loss=sums.pop(LOSS_MEAN), sums=sums)

    def values(self, scores: Scores) -> dict[str, float]:
        """Each metric that the scores tell, by name."""
        found = {name: metric.value(scores) for name, metric in self.metrics.items()}
        return {name: value for name, value in found.items() if value is not None}


def _statistic(name: str, part: str, function: Statistic) -> Statistic:
    """What a user's own function counts, under the metric's name; `part`: the setting that names it."""

    def count(outputs: Tensor, examples: Examples) -> Sums:
        try:
            found = function(outputs, examples)
            return {f"{name}-{key}": float(found[key]) for key in ("total", "count")}
        except Exception as error:  # of a user's own code: any
            raise SettingsError(
                f"{part}: must return two sums over a batch, {{'total': ..., 'count': ...}}; it failed with "
                f"{type(error).__name__}: {error}"
            ) from error

    return count


def _ratio(name: str, scores: Scores) -> float | None:
    """A user's own metric: its total by its count; None where nothing was counted."""
    total, count = scores.sums[f"{name}-total"], scores.sums[f"{name}-count"]
    return total / count if count else None
