"""A split gives every example to exactly one part, keeps both parts alive, and is the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedveil.core.errors import DataError
from fedveil.datasets import splits

fractions = st.floats(0.001, 0.999)


@given(st.integers(2, 300), fractions)
def test_a_shuffled_split_has_the_size_asked_for_and_loses_nothing(n, fraction):
    train, test = splits.shuffled(n, fraction)
    assert sorted([*train, *test]) == list(range(n))
    assert len(test) == min(max(round(n * fraction), 1), n - 1)
    assert np.array_equal(splits.shuffled(n, fraction)[1], test)


@given(npst.arrays(np.int64, st.integers(2, 200), elements=st.integers(0, 5)), fractions)
def test_a_stratified_split_takes_the_same_share_of_every_class_and_leaves_one_to_train_on(labels, fraction):
    if np.bincount(labels).max() < 2:
        return
    train, test = splits.stratified(labels, fraction)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels)
    assert len(test) > 0
    taken = [(int((labels[test] == c).sum()), int((labels == c).sum())) for c in set(labels)]
    wanted = [(min(round(n * fraction), n - 1), n) for _, n in taken]
    if any(count for count, _ in wanted):
        assert taken == wanted
    else:
        assert len(test) == 1


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
