"""One round: its cohort, its replies, and its next model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedveil.core.metrics import Scores
from fedveil.core.randomness import Stream
from fedveil.server.checkpoint import Parameters
from fedveil.server.exchange import Exchanged, Row


@dataclass
class Round:
    """A round, filled in as it proceeds.

    number: from 1
    stream: of its random choices
    learning_rate: of the clients' optimisers
    model_round: the round that made the model that was sent; 0 for the first model
    clip: the bound of updates, where it changes from round to round
    model: that was sent, float32 by name, or {SEALED: uint8 bytes}
    evaluates: whether its new model is evaluated
    asked: the clients that were asked for an update; empty where an earlier process asked them
    population: clients that the cohort was drawn from; 0 where nobody counts them
    skipped: why the round leaves the model as it is, with nothing revealed; empty where it made one
    trained, evaluated: the account of the messages of each stage, with rows for clients.csv and ledger.csv
    aggregate: the next model
    told: metrics of the strategy's own, from its aggregation
    mean: of the clients' weights where a protection opened it, before any noise of the server
    bound: the largest error of the mean from a protection's rounding, where nothing was clipped
    within: the noisy share of updates within `clip`
    validation, test: scores of the new model on the clients' held-out data, and on test data
    row: of metrics.csv, once the round is complete
    """

    number: int
    stream: Stream
    learning_rate: float
    model: Parameters
    evaluates: bool
    model_round: int = 0
    clip: float | None = None
    asked: list[int] = field(default_factory=list)
    population: int = 0
    skipped: str = ""
    trained: Exchanged = field(default_factory=Exchanged)
    evaluated: Exchanged = field(default_factory=Exchanged)
    aggregate: Parameters = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    mean: Parameters | None = None
    bound: float = 0.0
    within: float | None = None
    validation: Mapping[str, Any] | None = None
    test: Scores | None = None
    row: Row = field(default_factory=dict)

    @property
    def ledger(self) -> list[Row]:
        """Rows of ledger.csv, one for each message sent."""
        return self.trained.ledger + self.evaluated.ledger

    @property
    def clients(self) -> list[Row]:
        """Rows of clients.csv, one for each client and stage."""
        return self.trained.clients + self.evaluated.clients
