"""Scores of attacks and of guessing: the only module that compares answers with the truth.

Every score is a dictionary of numbers by the metric's name; the first metric is quoted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import roc_auc_score, roc_curve

from fedveil.core.examples import Examples, Task
from fedveil.datasets.text import UNKNOWN
from fedveil.simulations.attacks.lab.observation import Known, Parameters

Score = dict[str, float]
BEST = 200.0  # dB, of an image without any error
GOOD = (20.0, 30.0, 60.0, 100.0)  # dB, above which shares of images are reported


@dataclass(frozen=True)
class Truth:
    """The truth: the examples in an update and, for membership, which of the candidates were trained on.

    examples: of all clients in the observation, one after another; sizes: how many of them each client has
    members: bool [n], one for each of `Known.candidates`
    update: the mean change of the clients' weights; together: the mean change of the cohort that they were in, where
        the observer knows it
    """

    examples: Examples
    sizes: tuple[int, ...] = ()
    members: np.ndarray | None = None
    update: Parameters = field(default_factory=dict)
    together: Parameters | None = None

    @property
    def clients(self) -> list[Examples]:
        """The examples of each client."""
        if len(self.sizes) < 2:
            return [self.examples]
        ends = np.cumsum(self.sizes)
        return [self.examples.take(np.arange(end - size, end)) for end, size in zip(ends, self.sizes, strict=True)]


def words_of(examples: Examples) -> Counter[int]:
    """Count each word in all examples, without padding and unknown words."""
    ids, counts = np.unique(examples.features[examples.features > UNKNOWN], return_counts=True)
    return Counter(dict(zip(ids.tolist(), counts.tolist(), strict=True)))


def sentence_of(examples: Examples) -> list[int]:
    """Return the words of the first example in order, without padding and unknown words."""
    first = examples.features[0]
    return [int(word) for word in first[first > UNKNOWN]]


def score_words(found: Mapping[int, int], truth: Truth, task: Task) -> Score:
    """Score words by recall, precision and F1 over distinct words.

    of_one: the precision for one client's words, a mean over the clients; exact: whether all words are right
    counted: the share of the recovered words whose count is right too
    """
    wanted = words_of(truth.examples)
    told = [word for word in found if word > UNKNOWN]  # that some word was unknown says nothing
    right = [word for word in told if word in wanted]
    recall = len(right) / len(wanted) if wanted else 1.0
    precision = _share(told, wanted)
    return {
        "recall": recall,
        "precision": precision,
        "f1": 2 * recall * precision / (recall + precision) if recall + precision else 0.0,
        "of_one": float(np.mean([_share(told, words_of(examples)) for examples in truth.clients])),
        "exact": float(set(told) == set(wanted)),
        "counted": sum(found[word] == wanted[word] for word in right) / len(right) if right else 0.0,
    }


def _share(told: Sequence[int], wanted: Mapping[int, int]) -> float:
    return sum(word in wanted for word in told) / len(told) if told else float(not wanted)


def score_sentence(found: Sequence[int], truth: Truth, task: Task) -> Score:
    """Score a sentence: whether it is right to the word, and how much of it is in order (ROUGE-L, Lin 2004)."""
    wanted, found = sentence_of(truth.examples), [word for word in found if word > UNKNOWN]
    common = _common(found, wanted)
    recall = common / len(wanted) if wanted else 1.0
    precision = common / len(found) if found else float(not wanted)
    rouge = 2 * recall * precision / (recall + precision) if common else 0.0
    return {"exact": float(found == wanted), "rouge_l": rouge}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            row[j], before = (before + 1 if x == y else max(row[j], row[j - 1])), row[j]
    return row[-1]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two images in [0, 1], in dB; at most BEST."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return BEST if error == 0 else min(BEST, -10 * math.log10(error))


def matched(found: np.ndarray, wanted: np.ndarray) -> list[tuple[int, float]]:
    """Match found images to wanted ones, one to one, by PSNR (Kuhn 1955).

    Returns for each wanted image the index of its match and the PSNR in dB; -1 and -inf where no image is left.
    """
    answer = [(-1, -math.inf)] * len(wanted)
    if not len(found):
        return answer
    decibels = np.array([[psnr(a, b) for b in found] for a in wanted])
    for row, column in zip(*linear_sum_assignment(-decibels), strict=True):
        answer[row] = (int(column), float(decibels[row, column]))
    return answer


def score_images(found: np.ndarray, truth: Truth, task: Task) -> Score:
    """Score images by the mean, median and least dB of a batch matched one to one, and the shares above each of GOOD.

    An image without a match counts as matched by a black one.
    """
    wanted = truth.examples.features
    black = np.zeros(wanted.shape[1:], np.float32)
    decibels = [
        value if index >= 0 else psnr(black, image)
        for (index, value), image in zip(matched(np.asarray(found), wanted), wanted, strict=True)
    ]
    shares = {f"above_{level:g}": float(np.mean(np.array(decibels) > level)) for level in GOOD}
    return {"psnr": float(np.mean(decibels)), "median": float(np.median(decibels)), "least": min(decibels), **shares}


def score_labels(found: np.ndarray, truth: Truth, task: Task) -> Score:
    """Score counts of labels: the share of labels that is right, and whether all are."""
    wanted = np.bincount(truth.examples.labels, minlength=len(task.classes))
    found = np.asarray(found)
    return {
        "accuracy": float(np.minimum(found, wanted).sum() / max(1, wanted.sum())),
        "exact": float((found == wanted).all()),
    }


def score_members(found: np.ndarray, truth: Truth, task: Task) -> Score:
    """Score membership: the area under the ROC curve, and the true positive rate at 1 % false positives."""
    assert truth.members is not None
    false, true, _ = roc_curve(truth.members, found)
    return {
        "auc": float(roc_auc_score(truth.members, found)),
        "tpr_at_1_fpr": float(true[false <= 0.01].max(initial=0.0)),
    }


def score_update(found: Parameters, truth: Truth, task: Task) -> Score:
    """Score an update by its cosine with the true one, and by |found - true| / |true|."""
    if not truth.update:
        return {"cosine": 0.0, "relative_error": 1.0}
    one, true = (np.concatenate([np.ravel(each[name]) for name in truth.update]) for each in (found, truth.update))
    length, wanted, off = (float(np.linalg.norm(each)) for each in (one, true, one - true))
    return {
        "cosine": float(one @ true) / (length * wanted) if length * wanted else 0.0,
        "relative_error": off / wanted if wanted else math.inf,
    }


SCORES: dict[str, Callable[[Any, Truth, Task], Score]] = {
    "words": score_words,
    "sentence": score_sentence,
    "images": score_images,
    "labels": score_labels,
    "members": score_members,
    "update": score_update,
}


def guess(recovers: str, truth: Truth, known: Known, rng: np.random.Generator) -> Any:
    """Return the baseline: an answer from auxiliary examples, without an observation.

    words: the most frequent ones, as many as there are; sentence: the right words in random order
    images: the mean image; labels: the same count for all classes; members: random scores
    update: that of the whole cohort, which one run tells
    """
    alike = known.auxiliary
    if recovers == "words":
        assert alike is not None
        return dict.fromkeys([word for word, _ in words_of(alike).most_common(len(words_of(truth.examples)))], 1)
    if recovers == "sentence":
        return [int(word) for word in rng.permutation(sentence_of(truth.examples))]
    if recovers == "images":
        assert alike is not None
        return np.repeat(alike.features.mean(0, keepdims=True), len(truth.examples), axis=0)
    if recovers == "labels":
        n, classes = len(truth.examples), len(known.task.classes)
        counts = np.full(classes, n // classes)
        counts[rng.permutation(classes)[: n % classes]] += 1
        return counts
    if recovers == "update":
        return truth.together or {name: np.zeros_like(value) for name, value in truth.update.items()}
    assert truth.members is not None
    return rng.random(len(truth.members))
