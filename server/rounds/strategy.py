"""What a round asks of its strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedveil.algorithms.algorithm import Arrays, Cohort
from fedveil.core.randomness import Stream


class Strategy(Protocol):
    """Whom a round asks, with what; and what it makes of their answers.

    reports: metrics that a client must tell beside its update
    """

    reports: tuple[str, ...]

    def train_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that ask a cohort for updates; config: what each is told."""

    def aggregate(self, number: int, cohort: Cohort) -> Arrays | None:
        """Return the next model, float32 or float64 by name; None where the strategy makes none; raise TrainingError where it cannot."""

    def evaluate_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that ask clients to evaluate a model on what they hold out."""

    def scores(self, number: int, replies: list[Message]) -> Mapping[str, Any] | None:
        """Return the scores over all that clients hold out, by name; None where none has evaluated."""

    def kept(self) -> Mapping[str, Any]:
        """Return what the strategy takes from one round to the next, by name, for a checkpoint."""

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take what an earlier process' strategy kept."""
