"""What every round of a run works with."""

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
from fedveil.core.wire.messages import RUN, SEALED, to_arrays, to_sealed
from fedveil.server.checkpoint import Parameters, State
from fedveil.server.exchange import Row
from fedveil.server.protection.server_protection import ServerProtection
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.strategy import Strategy


@dataclass(frozen=True)
class Hooks:
    """What the caller of a run adds to it.

    watch: is shown the row of each round once the round is kept
    evaluate: scores of a model on the server's test data; None where it has none, or cannot read the model
    warn: is told why a client was left out
    inspect: a simulation's own look at a protected model and the clients in it: how far it lies from their plain mean
    lenient: a client whose update is not finite is left out, as other machines may send anything; else the run ends there
    secret: where the run has noise, the server's, and who takes part, come from the operating system's generator: clients on
        other machines know the seed
    """

    watch: Callable[[Row, State], None]
    evaluate: Callable[[Parameters], Scores] | None = None
    warn: Callable[[str], None] = lambda _text: None
    inspect: Callable[[Parameters, Sequence[int]], float] | None = None
    lenient: bool = False
    secret: bool = False


@dataclass(frozen=True)
class Context:
    """What every round of a run works with.

    protection: the server's part of one; None where updates travel in the clear
    observers: see every round, in this order
    metrics: what is told of each evaluation
    folder: of the record, which errors name
    """

    grid: Grid
    experiment: Experiment
    strategy: Strategy
    protection: ServerProtection | None
    hooks: Hooks
    observers: Sequence[Observer]
    metrics: MetricSet
    folder: Path

    @property
    def timeout(self) -> float:
        """Seconds that a round waits for its replies."""
        return self.experiment.federation.deadline

    def config(self, current: Round) -> dict[str, Any]:
        """What clients are told with a model, beside what the strategy has to say."""
        run = {} if self.protection is None else {RUN: self.protection.run}
        return {"learning-rate": current.learning_rate, **run}

    @contextmanager
    def named(self, number: int) -> Iterator[None]:
        """Let an error say in which round it came, and what is kept."""
        try:
            yield
        except (TrainingError, ProtectionError) as error:
            kept = f"\n  kept: the model and metrics of rounds up to {number - 1}, in {self.folder}"
            raise type(error)(f"round {number}: {error}{kept}") from error


def to_record(model: Parameters, protection: str) -> ArrayRecord:
    """Return a model as it travels: weights, or a ciphertext of a protection."""
    return to_sealed(model[SEALED].tobytes(), protection) if SEALED in model else to_arrays(model)
