"""Words read from a word table: against tables whose rows were moved by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.leakage.words import counts, find, moved

WORDS, SIZE = 800, 16


def table(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    rows = rng.normal(size=(WORDS, size)).astype(np.float32)
    rows[0] = 0
    return rows


def chosen(rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(np.arange(1, WORDS), rng.integers(1, 40), replace=False))


def stepped(rng: np.random.Generator, before: np.ndarray, own: np.ndarray, step: float) -> np.ndarray:
    """The table after a step on some words, in float32."""
    after = before.copy()
    after[own] -= (step * rng.normal(size=(len(own), before.shape[1]))).astype(np.float32)
    return after


def difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return after.astype(np.float64) - before


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-6, 1e-3, 1.0]), st.integers(1, WORDS - 2))
def test_where_nothing_else_moves_the_words_are_the_rows_that_moved_however_many(seed, step, n):
    rng = np.random.default_rng(seed)
    before = table(rng)
    own = np.sort(rng.choice(np.arange(1, WORDS), n, replace=False))
    after = stepped(rng, before, own, step)
    changed = np.flatnonzero((after != before).any(axis=1))
    np.testing.assert_array_equal(moved(before, difference(after, before)), changed)


def sgd(w: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        w = w - np.float32(0.1) * (np.float32(1e-4) * w)
    return w


def strong(w: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        w = w * np.float32(1 - 1e-3)
    return w


def adam(w: np.ndarray, steps: int) -> np.ndarray:
    """Adam takes weight decay for a gradient, and its first steps along a gradient that stays are as long as the rate."""
    for _ in range(steps):
        slope = np.float32(1e-4) * w
        w = w - np.float32(1e-3) * slope / (np.abs(slope) + np.float32(1e-8))
    return w


@pytest.mark.parametrize(
    ("decay", "size", "precision"),
    [(sgd, 1, 1), (sgd, SIZE, 1), (strong, 1, 1), (strong, SIZE, 1), (adam, 2 * SIZE, 0.98)],
)
def test_under_weight_decay_of_any_optimiser_the_words_stand_out(decay, size, precision):
    right = told = wanted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        before = table(rng, size)
        own = chosen(rng)
        after = decay(before, 1 + seed % 5)
        after[own] += (np.sign(rng.normal(size=(len(own), size))) * 0.02).astype(np.float32)
        found = moved(before, difference(after, before))
        right, told, wanted = right + len(np.intersect1d(found, own)), told + len(found), wanted + len(own)
    assert right == wanted
    assert right >= precision * told


@pytest.mark.parametrize("size", [1, 4, SIZE])
def test_in_noise_alone_hardly_a_word_in_two_thousand_is_invented(size):
    invented = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        before = table(rng, size)
        change = rng.normal(size=before.shape) * 1e-3
        change[0] = 0
        invented += len(moved(before, change))
    assert invented <= 50 * WORDS / 2000


@pytest.mark.parametrize("clients", [2, 5, 10, 40])
def test_in_the_mean_of_clients_the_words_of_all_are_found_and_what_float32_rounds_is_not(clients):
    right = told = wanted = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        before = table(rng)
        owned = [chosen(rng) for _ in range(clients)]
        shares = rng.dirichlet(np.ones(clients) * 5).astype(np.float32)
        mean = np.zeros_like(before)
        for own, share in zip(owned, shares, strict=True):
            mean += share * stepped(rng, before, own, 0.1)
        everybody, found = np.unique(np.concatenate(owned)), moved(before, difference(mean, before), clients)
        right, told = right + len(np.intersect1d(found, everybody)), told + len(found)
        wanted += len(everybody)
    assert right == wanted
    assert right == told


@settings(max_examples=100, deadline=None)
@given(
    often=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    size=st.sampled_from([1, 4, 32]),
    seed=st.integers(0, 999),
)
def test_words_of_a_pooled_text_are_counted_up_to_what_all_counts_share(often, size, seed):
    rng = np.random.default_rng(seed)
    rows = np.outer(often, rng.normal(size=size) + 0.1)
    rows *= 1 + 1e-4 * rng.normal(size=rows.shape)  # as float32 rounds
    found = counts(rows)
    assert found is not None
    np.testing.assert_array_equal(found, np.array(often) // math.gcd(*often))


def test_rows_that_are_no_multiples_of_one_another_are_not_counted():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=8)
    assert counts(rng.normal(size=(5, 8))) is None  # an LSTM's
    assert counts(np.outer([1, -2, 1], direction)) is None  # texts of two classes
    assert counts(np.outer([1, math.pi, math.sqrt(2), math.e, 1.2345], direction)) is None  # texts of several lengths
    assert counts(np.zeros((0, 8))).tolist() == []


def test_the_word_table_is_the_first_tensor_with_a_row_a_word():
    tensors = {"shift": np.zeros(9), "words": np.zeros((50, 64)), "output": np.zeros((60, 3))}
    assert find(tensors, 50) == "words"
    assert find(tensors, 55) == "output"
    assert find(tensors, 61) is None
