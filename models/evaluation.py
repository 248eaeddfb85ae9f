"""How good a model is: loss, accuracy, and for two classes precision, recall, F1 and AUC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream, torch_random
from fedveil.models import parameters as weights
from fedveil.models.inputs import device_of, to_tensor
from fedveil.models.losses import loss


@dataclass(frozen=True)
class Scores:
    """What an evaluation counted; scores of several clients make one with `merge`.

    loss: mean over the examples
    correct: examples whose class was predicted
    true_positives, false_positives, false_negatives: of the second of two classes; 0 where there are more
    auc: area under the ROC curve; None for more than two classes, where one class is missing, or after a merge
    """

    examples: int
    loss: float
    correct: int
    true_positives: int
    false_positives: int
    false_negatives: int
    auc: float | None

    @property
    def accuracy(self) -> float:
        """The share of examples whose class was predicted."""
        return self.correct / self.examples

    @property
    def precision(self) -> float:
        """The share of positives among those predicted positive; 0 where none was."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """The share of positives that were predicted positive; 0 where there are none."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 where there are no positives, true or predicted."""
        return _share(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    def as_metrics(self, binary: bool) -> dict[str, float]:
        """The scores by name: loss and accuracy; with two classes (`binary`) precision, recall, f1, and auc if known."""
        metrics = {"loss": self.loss, "accuracy": self.accuracy}
        if binary:
            metrics |= {"precision": self.precision, "recall": self.recall, "f1": self.f1}
            if self.auc is not None:
                metrics["auc"] = self.auc
        return metrics


def evaluate(
    network: nn.Module, parameters: Mapping[str, Tensor] | None, examples: Examples, loss_kind: str, batch: int = 1000
) -> Scores:
    """Score `parameters` (the network's own where None) on `examples`, `batch` at a time.

    The network is given back as it was, and random states are not touched. A network that draws random numbers even
    when it evaluates gets the same ones every time. Raises DataError without examples or for weights of another network.
    """
    if len(examples) == 0:
        raise DataError("there are no examples to evaluate on; check the data settings (data.validation_fraction)")
    device = device_of(network)
    total, outputs = 0.0, []
    with (
        weights.kept(network),
        torch.no_grad(),
        torch_random(Stream(0), "evaluation", cuda=device_of(network).type == "cuda"),
    ):
        if parameters is not None:
            weights.check_fit(network, parameters)
            weights.place(network, parameters)
        network.eval()
        for first in range(0, len(examples), batch):
            inputs = to_tensor(examples.features[first : first + batch], device)
            labels = to_tensor(examples.labels[first : first + batch], device)
            logits = network(inputs)  # [n, classes] or [n, 1]
            total += float(loss(logits, labels, loss_kind)) * len(labels)
            outputs.append(logits.double().cpu())
    return _score(torch.cat(outputs).numpy(), examples.labels, total / len(examples))


def merge(scores: Sequence[Scores]) -> Scores:
    """The scores of all clients' examples together; of several, the AUC is not known (None).

    Raises DataError where there are none.
    """
    if not scores:
        raise DataError("there are no scores to merge: no client has evaluated")
    if len(scores) == 1:
        return scores[0]
    examples = sum(s.examples for s in scores)
    return Scores(
        examples=examples,
        loss=sum(s.loss * s.examples for s in scores) / examples,
        correct=sum(s.correct for s in scores),
        true_positives=sum(s.true_positives for s in scores),
        false_positives=sum(s.false_positives for s in scores),
        false_negatives=sum(s.false_negatives for s in scores),
        auc=None,
    )


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947; Hanley and McNeil 1982).

    scores: float [n]; positive: bool [n]. None where one class is missing or a score is not a number.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0 or np.isnan(scores).any():
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, from 1; ties share their mean rank
    above = ranks[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _score(outputs: np.ndarray, labels: np.ndarray, mean_loss: float) -> Scores:
    """Count what logits [n, classes] or [n, 1] get right of labels [n]."""
    single = outputs.shape[1] == 1
    predicted = (outputs[:, 0] > 0).astype(np.int64) if single else outputs.argmax(axis=1)
    binary = outputs.shape[1] <= 2
    score = outputs[:, 0] if single else outputs[:, 1] - outputs[:, 0]
    return Scores(
        examples=len(labels),
        loss=mean_loss,
        correct=int((predicted == labels).sum()),
        true_positives=int(((predicted == 1) & (labels == 1)).sum()) if binary else 0,
        false_positives=int(((predicted == 1) & (labels == 0)).sum()) if binary else 0,
        false_negatives=int(((predicted == 0) & (labels == 1)).sum()) if binary else 0,
        auc=auc(score, labels == 1) if binary else None,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
