"""A split gives every example to exactly one part, keeps both parts alive, and is the same every time."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.datasets import load_digits

from fedveil.core.errors import DataError
from fedveil.datasets import splits

fractions = st.floats(0.001, 0.999)


@given(st.integers(2, 300), fractions)
def test_a_shuffled_split_has_the_size_asked_for_and_loses_nothing(n, fraction):
    train, test = splits.shuffled(n, fraction)
    assert sorted([*train, *test]) == list(range(n))
    assert len(test) == min(max(round(n * fraction), 1), n - 1)
    assert np.array_equal(splits.shuffled(n, fraction)[1], test)


@given(npst.arrays(np.int64, st.integers(2, 200), elements=st.integers(0, 40)), fractions)
def test_a_stratified_split_takes_about_the_share_of_every_class_and_of_all_and_leaves_one_to_train_on(
    labels, fraction
):
    sizes = np.bincount(labels)
    if sizes.max() < 2:
        return
    train, test = splits.stratified(labels, fraction)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels)
    taken = np.bincount(labels[test], minlength=len(sizes))
    asked = len(labels) * fraction
    most = np.minimum(np.ceil(sizes * fraction), np.maximum(sizes - 1, 0)).sum()  # a class has one to train on
    assert abs(len(test) - min(max(asked, 1), most)) <= max(1, asked / 10 + 0.5)
    kept_all = np.maximum(sizes - 1, 0)
    assert (np.abs(taken - np.minimum(sizes * fraction, kept_all)) < 1 + 1e-9).all()


@pytest.mark.parametrize(("classes", "each", "fraction"), [(100, 2, 0.2), (100, 3, 0.1), (1000, 4, 0.1), (50, 7, 0.35)])
def test_many_classes_of_few_examples_are_tested_at_the_share_asked_for(classes, each, fraction):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))
    _, test = splits.stratified(labels, fraction)
    assert abs(len(test) - classes * each * fraction) <= 0.1 * classes * each * fraction
    tested = np.flatnonzero(np.bincount(labels[test], minlength=classes))
    assert abs(tested.mean() - classes / 2) < classes / 10  # not the first ones in alphabetical order


def test_digits_are_split_as_they_were_by_rounding_each_class():
    labels = load_digits().target
    train, test = splits.stratified(labels, 0.2)
    assert np.array_equal(np.bincount(labels[test]), np.rint(np.bincount(labels) * 0.2))
    digest = sha256(np.concatenate([train, test]).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "ae21a7a814a9cf04"


def test_a_split_is_shuffled_and_not_by_position():
    train, test = splits.shuffled(1000, 0.5)
    assert abs(np.mean(test) - 500) < 50
    assert (np.diff(train) < 0).any()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_examples_to_split_are_refused(n):
    with pytest.raises(DataError, match="at least 2"):
        splits.shuffled(n, 0.5)
    with pytest.raises(DataError, match="no class"):
        splits.stratified(np.arange(n), 0.5)


def test_classes_of_one_example_each_cannot_be_split():
    with pytest.raises(DataError, match="no class of the 5 examples has 2"):
        splits.stratified(np.arange(5), 0.5)
