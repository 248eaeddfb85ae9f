"""What accuracy to expect of noise: the ratio by hand, and when a warning says what."""

from __future__ import annotations

import math

import pytest

from fedveil import Experiment
from fedveil.privacy.dp.accounting.expectation import drowning, expectation


def noisy(multiplier: float, **settings) -> Experiment:
    privacy = {"privacy.clip": 1.0, "privacy.noise_multiplier": multiplier, "privacy.noise_at": "server"}
    few = {"data.clients": 25, "federation.cohort": 25, "federation.rounds": 16}
    return Experiment.preset("digits").override({**few, **privacy, **settings})


def test_the_ratio_is_of_the_noise_in_all_rounds_to_what_they_teach() -> None:
    assert drowning(noisy(2.0), 10_000) == pytest.approx(2.0 * 100 / 25 / 4)
    own = noisy(2.0, **{"privacy.noise_at": "client"})
    assert drowning(own, 10_000) == pytest.approx(2.0 * 100 / 5 / 4)
    step = {"privacy.unit": "example", "training.steps": 1, "training.epochs": None, "training.batch_size": 8}
    assert drowning(noisy(2.0, **step), 10_000, 50) == pytest.approx(2.0 * 100 / (25 * 8) / 4)
    local = {"privacy.unit": "example", "privacy.noise_at": "client", "training.epochs": 2, "training.batch_size": 8}
    assert drowning(noisy(2.0, **local), 10_000, 50) == pytest.approx(2.0 * 100 / (5 * 8) / math.sqrt(16 * 14))
    assert drowning(Experiment.preset("digits"), 10_000) == 0.0


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0.99, None),
        (1.01, "clearly less"),
        (3.01, "half of what it would learn"),
        (6.01, "no better than guessing, 0.10"),
    ],
)
def test_a_warning_says_how_much_is_lost_and_how_many_clients_would_do(ratio, said) -> None:
    found = expectation(noisy(ratio), 10_000, 0.1)
    if said is None:
        assert found is None
        return
    assert found is not None
    assert said in found
    assert f"about {math.ceil(ratio * 25)} clients a round would do" in found
    assert expectation(noisy(0.999, **{"data.clients": 27, "federation.cohort": 27}), 10_000, 0.1) is None


def test_clients_noise_of_their_own_is_better_added_in_their_sum_alone() -> None:
    found = expectation(noisy(1.0, **{"privacy.noise_at": "client"}), 10_000, 0.1)
    assert found is not None
    assert "about 625 clients a round would do, or noise in their sum alone (privacy.noise_at)" in found
