"""The parts of a run that all of its rounds share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedveil.core.errors import ProtectionError, TrainingError
from fedveil.core.metrics import MetricSet, Scores
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import CLIP, MODEL_ROUND, RUN, SEALED, to_arrays, to_sealed
from fedveil.privacy.dp.noise import secret_normal
from fedveil.server.checkpoint import Parameters, State
from fedveil.server.exchange import Row
from fedveil.server.protection.noise import Draw
from fedveil.server.protection.server_protection import ServerProtection
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.strategy import Strategy


@dataclass(frozen=True)
class Hooks:
    """The caller's additions to a run.

    watch: receives the row of each round once the round is saved
    evaluate: returns the scores of a model on the server's test data; None where it has none, or cannot read the model
    warn: receives the reason why a client was left out
    inspect: of a simulation, returns the distance of a protected model from the plain mean of the clients in it
    lenient: leave out a client whose update is not finite, because other machines may send anything; else the run ends
    secret: where the run has noise, draw the server's noise and the cohorts from the operating system's generator,
    because clients on other machines know the seed
    observers: of every round, after the run's own
    """

    watch: Callable[[Row, State], None]
    evaluate: Callable[[Parameters], Scores] | None = None
    warn: Callable[[str], None] = lambda _text: None
    inspect: Callable[[Parameters, Sequence[int]], float] | None = None
    lenient: bool = False
    secret: bool = False
    observers: Sequence[Observer] = ()


@dataclass(frozen=True)
class Context:
    """The parts of a run that all of its rounds share.

    protection: the server's part of a protection; None where updates travel in the clear
    observers: of every round, in this order
    metrics: of each evaluation
    folder: of the record, which errors name
    draw: the server's noise, round by round
    """

    grid: Grid
    experiment: Experiment
    strategy: Strategy
    protection: ServerProtection | None
    hooks: Hooks
    observers: Sequence[Observer]
    metrics: MetricSet
    folder: Path
    draw: Draw = lambda _number, size: secret_normal(size)

    @property
    def timeout(self) -> float:
        """Seconds that a round waits for its replies."""
        return self.experiment.federation.deadline

    def config(self, current: Round) -> dict[str, Any]:
        """Return the settings that clients receive with a model, beside those of the strategy."""
        run = {} if self.protection is None else {RUN: self.protection.run}
        clip = {} if current.clip is None else {CLIP: current.clip}
        # clients check which round made an encrypted model
        skipped = self.experiment.privacy.shows == "sum" and current.model_round != current.number - 1
        made = {MODEL_ROUND: current.model_round} if skipped else {}
        return {"learning-rate": current.learning_rate, **run, **clip, **made}

    @contextmanager
    def named(self, number: int) -> Iterator[None]:
        """Add to an error the round in which it occurred, and what is saved."""
        try:
            yield
        except (TrainingError, ProtectionError) as error:
            kept = f"\n  kept: the model and metrics of rounds up to {number - 1}, in {self.folder}"
            raise type(error)(f"round {number}: {error}{kept}") from error


def to_record(model: Parameters, protection: str) -> ArrayRecord:
    """Return a model as it travels: weights, or a protection's ciphertext."""
    return to_sealed(model[SEALED].tobytes(), protection) if SEALED in model else to_arrays(model)
