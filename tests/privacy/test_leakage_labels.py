"""Labels read from the last bias: against the gradient of cross entropy, by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.leakage.labels import counts, find, one, per_class, present, whole


def batch(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n], the mean of probabilities and the gradient of the bias, both [classes]."""
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n)
    return labels, probabilities.mean(axis=0), (probabilities - np.eye(classes)[labels]).mean(axis=0)


@given(st.integers(0, 2**32), st.integers(2, 20))
def test_the_label_of_one_example_is_the_only_class_with_a_negative_gradient(seed, classes):
    labels, _, gradient = batch(seed, 1, classes)
    assert one(gradient) == labels[0]
    assert present(gradient).tolist() == labels.tolist()


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(2, 20))
def test_counts_are_exact_where_the_mean_of_probabilities_is_known_and_what_is_present_is(seed, n, classes):
    labels, shares, gradient = batch(seed, n, classes)
    np.testing.assert_array_equal(counts(gradient, shares, n), np.bincount(labels, minlength=classes))
    assert set(present(gradient)) <= set(labels)


@given(st.integers(0, 2**32), st.integers(1, 50))
def test_the_one_logit_of_two_classes_says_the_same_as_two(seed, n):
    labels, shares, gradient = batch(seed, n, 2)
    assert per_class(gradient) is gradient
    np.testing.assert_allclose(per_class(gradient[1:]), gradient, atol=1e-12)
    assert counts(per_class(gradient[1:]), shares, n)[1] == labels.sum()


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12), st.integers(0, 100))
def test_whole_numbers_add_up_and_are_as_near_as_any(wanted, total):
    wanted = np.array(wanted)
    found = whole(wanted, total)
    assert found.sum() == total
    assert found.min() >= 0
    for i in np.flatnonzero(found):  # moving one from one class to another is no better
        gain = (found[i] - wanted[i]) - (found - wanted)  # half of what it would change in squares, less one
        assert gain[np.arange(len(wanted)) != i].max(initial=-np.inf) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("last", "classes", "name"),
    [((3,), 3, "output.bias"), ((1,), 2, "output.bias"), ((2,), 2, "output.bias"), ((1,), 3, None), ((3, 4), 3, None)],
)
def test_the_bias_of_the_output_is_the_last_tensor_or_there_is_none(last, classes, name):
    assert find({"first": np.zeros(classes), "output.bias": np.zeros(last)}, classes) == name
    assert find({}, classes) is None
