"""Each schedule against its closed formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.settings.sections import Training
from fedveil.models.local.schedules import Schedule, replay

ROUNDS = 23


def rates(losses: list[float] | None = None, **chosen: Any) -> list[float]:
    schedule = Schedule(Training(learning_rate=0.3, **chosen), ROUNDS)
    found = []
    for round_ in range(ROUNDS):
        found.append(schedule.rate)
        schedule.advance(losses[round_] if losses else 1.0)
    return found


def test_a_constant_rate_stays() -> None:
    assert rates() == [0.3] * ROUNDS


def test_a_step_schedule_falls_every_few_rounds() -> None:
    expected = [0.3 * 0.5 ** (t // 4) for t in range(ROUNDS)]
    assert rates(schedule="step", schedule_rounds=4, schedule_factor=0.5) == pytest.approx(expected)


def test_an_exponential_schedule_falls_every_round() -> None:
    assert rates(schedule="exponential", schedule_factor=0.9) == pytest.approx([0.3 * 0.9**t for t in range(ROUNDS)])


def test_a_cosine_falls_to_its_minimum_over_the_federations_rounds() -> None:
    expected = [0.05 + (0.3 - 0.05) / 2 * (1 + math.cos(math.pi * t / ROUNDS)) for t in range(ROUNDS)]
    assert rates(schedule="cosine", schedule_minimum=0.05) == pytest.approx(expected)


def test_a_cyclic_schedule_rises_from_its_minimum_to_the_rate_and_falls_again() -> None:
    expected = [0.1 + (0.3 - 0.1) * (1 - abs(t % 10 - 5) / 5) for t in range(ROUNDS)]
    assert rates(schedule="cyclic", schedule_minimum=0.1, schedule_rounds=5) == pytest.approx(expected)


def test_a_plateau_schedule_falls_when_the_training_loss_has_not_improved_for_more_rounds_than_allowed() -> None:
    losses = [5.0, 4.0] + [4.0] * 9 + [1.0] * (ROUNDS - 11)
    expected, rate, best, waited = [], 0.3, math.inf, 0
    for value in losses:
        expected.append(rate)
        best, waited = (value, 0) if value < best * (1 - 1e-4) else (best, waited + 1)
        if waited > 2:
            rate, waited = max(rate * 0.5, 0.06), 0
    assert min(expected) == 0.06
    found = rates(losses, schedule="plateau", schedule_rounds=2, schedule_factor=0.5, schedule_minimum=0.06)
    assert found == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["constant", "step", "exponential", "cosine", "cyclic", "plateau"]),
    losses=st.lists(st.floats(0, 10), min_size=12, max_size=12),
    done=st.integers(0, 11),
)
def test_a_replayed_schedule_goes_on_to_the_bit(kind: Any, losses: list[float], done: int) -> None:
    training = Training(learning_rate=0.3, schedule=kind, schedule_rounds=2)
    whole, resumed = Schedule(training, 12), replay(training, 12, losses[:done])
    for value in losses[:done]:
        whole.advance(value)
    for value in losses[done:]:
        assert resumed.rate == whole.rate
        whole.advance(value)
        resumed.advance(value)
    assert resumed.rate == whole.rate
