"""Losses against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.models.local.losses import loss


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 8), classes=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_losses_are_the_mean_over_examples_of_their_formulas(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs, labels = rng.normal(0, 3, (n, classes)), rng.integers(0, max(classes, 2), n)
    cross_entropy, squared_error = [], []
    for logits, label in zip(outputs, labels, strict=True):
        if classes == 1:
            p = 1 / (1 + np.exp(-logits[0]))
            cross_entropy.append(-np.log(p if label == 1 else 1 - p))
            squared_error.append((p - label) ** 2)
        else:
            probabilities = np.exp(logits) / np.exp(logits).sum()
            cross_entropy.append(-np.log(probabilities[label]))
            squared_error.append(sum((p - (c == label)) ** 2 for c, p in enumerate(probabilities)))
    for kind, expected in [("cross_entropy", cross_entropy), ("squared_error", squared_error)]:
        found = loss(torch.tensor(outputs, dtype=torch.float32), torch.tensor(labels), kind)
        assert found.shape == ()
        assert float(found) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-5)


def test_a_logit_that_is_certain_and_wrong_has_a_finite_loss() -> None:
    assert float(loss(torch.tensor([[200.0]]), torch.tensor([0]), "cross_entropy")) == pytest.approx(200)
