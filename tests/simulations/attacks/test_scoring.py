"""Scores against slow, obvious ones; guessing gives what the field's baselines say."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedveil.core.examples import Examples, Task
from fedveil.simulations.attacks.lab.scoring import (
    BEST,
    Truth,
    matched,
    psnr,
    score_images,
    score_labels,
    score_members,
    score_sentence,
    score_words,
    words_of,
)  # fmt: skip

TEXT = Task("text", (6,), ("ham", "spam"), 20)
IMAGES = Task("images", (1, 2, 2), ("0", "1", "2"))


def texts(*rows: list[int]) -> Truth:
    features = np.zeros((len(rows), 6), np.int32)
    for i, row in enumerate(rows):
        features[i, : len(row)] = row
    return Truth(Examples(features, np.zeros(len(rows), np.int64)))


def images(values: np.ndarray) -> Truth:
    return Truth(Examples(values.astype(np.float32), np.zeros(len(values), np.int64)))


def test_words_are_counted_without_padding_and_unknown_ones() -> None:
    assert words_of(texts([2, 3, 3, 1], [2]).examples) == {2: 2, 3: 2}


def test_recall_and_precision_are_over_distinct_words() -> None:
    score = score_words({2: 2, 3: 1, 9: 1, 1: 1}, texts([2, 3, 3, 4]), TEXT)
    assert score == {
        "recall": pytest.approx(2 / 3), "precision": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3), "of_one": pytest.approx(2 / 3), "exact": 0.0,
        "counted": 0.0,
    }  # fmt: skip
    assert score_words({2: 1, 3: 2}, texts([2, 3, 3]), TEXT)["counted"] == 1.0
    assert score_words({}, texts([2]), TEXT) == {
        "recall": 0,
        "precision": 0,
        "f1": 0,
        "of_one": 0,
        "exact": 0,
        "counted": 0,
    }


def test_what_is_read_of_several_clients_together_says_less_of_one() -> None:
    both = texts([2, 3], [4, 5, 6])
    truth = Truth(both.examples, sizes=(1, 1))
    score = score_words(dict.fromkeys(range(2, 7), 1), truth, TEXT)
    assert (score["precision"], score["recall"]) == (1, 1)
    assert score["of_one"] == pytest.approx((2 / 5 + 3 / 5) / 2)


@given(st.lists(st.integers(2, 19), min_size=1, max_size=6), st.lists(st.integers(2, 19), max_size=6))
def test_rouge_l_is_of_the_longest_common_subsequence(wanted, found) -> None:
    def subsequences(row):
        return {tuple(row[i] for i in range(len(row)) if mask >> i & 1) for mask in range(1 << len(row))}

    longest = max(len(each) for each in subsequences(wanted) & subsequences(found))
    score = score_sentence(found, texts(wanted), TEXT)
    f1 = 2 * longest / (len(wanted) + len(found))
    assert score["rouge_l"] == pytest.approx(f1)
    assert score["exact"] == (wanted == found)


def test_psnr_is_that_of_the_definition() -> None:
    a, b = np.zeros((1, 2, 2)), np.full((1, 2, 2), 0.1)
    assert psnr(a, b) == pytest.approx(20.0)
    assert psnr(a, a) == BEST


@given(
    arrays(np.float64, (3, 1, 2, 2), elements=st.floats(0, 1)),
    arrays(np.float64, (3, 1, 2, 2), elements=st.floats(0, 1)),
)
def test_a_batch_is_matched_as_well_as_any_order_could(wanted, found) -> None:
    best = max(sum(psnr(a, found[i]) for a, i in zip(wanted, order, strict=True)) for order in permutations(range(3)))
    assert sum(decibels for _, decibels in matched(found, wanted)) == pytest.approx(best)


def test_an_image_that_nobody_found_counts_as_black() -> None:
    wanted = np.array([np.full((1, 2, 2), 0.1), np.ones((1, 2, 2))])
    score = score_images(wanted[1:], images(wanted), IMAGES)
    assert score["median"] == pytest.approx((20 + BEST) / 2, abs=0.01)
    assert score["above_60"] == 0.5
    assert score_images(np.zeros((0, 1, 2, 2)), images(wanted), IMAGES)["least"] == pytest.approx(0.0, abs=1e-6)


def test_labels_are_compared_as_counts() -> None:
    truth = Truth(Examples(np.zeros((4, 1, 2, 2), np.float32), np.array([0, 0, 1, 2])))
    assert score_labels(np.array([2, 1, 1]), truth, IMAGES) == {"accuracy": 1.0, "exact": 1.0}
    assert score_labels(np.array([4, 0, 0]), truth, IMAGES) == {"accuracy": 0.5, "exact": 0.0}


def test_membership_is_an_area_and_what_is_found_before_one_in_a_hundred_is_accused_falsely() -> None:
    members = np.repeat([True, False], 200)
    perfect = score_members(np.where(members, 1.0, 0.0), Truth(texts([2]).examples, members=members), TEXT)
    assert perfect == {"auc": 1.0, "tpr_at_1_fpr": 1.0}
    scores = np.where(members, 0.0, 0.0)
    scores[:50] = 1.0  # a quarter of the members stands out; of the rest nothing is known
    found = score_members(scores, Truth(texts([2]).examples, members=members), TEXT)
    assert found["tpr_at_1_fpr"] == 0.25
    assert found["auc"] == pytest.approx(0.25 + 0.75 / 2)
    assert not math.isnan(found["auc"])
