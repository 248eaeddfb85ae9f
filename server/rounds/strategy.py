"""The interface of a strategy to the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedveil.algorithms.algorithm import Arrays, Cohort
from fedveil.core.randomness import Stream
from fedveil.server.rounds.sampling import Chance


class Strategy(Protocol):
    """Draws the clients of a round and their messages, and aggregates their updates.

    reports: metrics that a client must report beside its update
    told: metrics of its own that the last aggregation told, by name
    """

    reports: tuple[str, ...]
    told: Mapping[str, Any]

    def train_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, chance: Chance
    ) -> list[Message]:
        """Return the messages that ask a cohort for updates; config: the settings in each."""

    def aggregate(self, number: int, cohort: Cohort) -> Arrays | None:
        """Return the next model, float32 or float64 by name; None where the strategy makes none.

        Raise TrainingError where it cannot.
        """

    def evaluate_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that ask clients to evaluate a model on their held-out data."""

    def scores(self, number: int, replies: list[Message]) -> Mapping[str, Any] | None:
        """Return the scores over all held-out data, by name; None where no client has evaluated."""

    def kept(self) -> Mapping[str, Any]:
        """Return the strategy's state between rounds, by name, for a checkpoint."""

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Restore the state that an earlier process' strategy kept."""
