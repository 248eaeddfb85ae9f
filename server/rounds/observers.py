"""Observers of a run's rounds: each keeps a part of the record or of the run's state, and changes no round.

They are called in the order of their effects: a checkpoint comes after what it stores, and `Watch` shows rounds that
are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from flwr.app import Message

from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.server.checkpoint import State, save_state
from fedveil.server.exchange import Row
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.strategy import Strategy


class Observer:
    """An observer of rounds that does nothing; subclasses override what they need."""

    def first(self, row: Row, state: State) -> None:
        """Observe the row of the model that the run begins with."""

    def begun(self, current: Round, state: State) -> None:
        """Observe a round whose cohort is drawn, and not asked yet."""

    def opening(self, current: Round, clients: int, state: State) -> None:
        """Observe that a sum of so many clients' updates is about to be seen; nobody has seen it yet."""

    def replied(self, current: Round, client: int, reply: Message) -> None:
        """Observe a client's update as it arrives; raise ProtectionError where it cannot be read."""

    def aggregated(self, current: Round, state: State) -> None:
        """Observe a round whose next model is made, and not sent yet."""

    def evaluated(self, current: Round, client: int, reply: Message) -> None:
        """Observe a client's evaluation of the next model."""

    def finished(self, current: Round, state: State) -> None:
        """Observe a complete round; state: the run's, after the round."""

    def stopped(self, state: State) -> None:
        """Observe that the run stops before its next round; state.stopped says why."""

    def ended(self) -> None:
        """Observe the end of the run."""


class BestModel(Observer):
    """Keeps the best model: by validation accuracy where clients evaluate, else by test accuracy; of equals, by loss."""

    def __init__(self, experiment: Experiment) -> None:
        self._federated = experiment.evaluation.federated

    def finished(self, current: Round, state: State) -> None:
        """Compare the round's accuracy with the best so far."""
        part = "validation" if self._federated else "test"
        accuracy, loss = current.row[f"{part}_accuracy"], current.row[f"{part}_loss"]
        if accuracy is None:
            return
        state.stale = 0 if accuracy > state.best_accuracy else state.stale + 1
        if (accuracy, -loss) > (state.best_accuracy, -state.best_loss):
            state.best_round, state.best_parameters = current.number, current.aggregate
            state.best_accuracy, state.best_loss = accuracy, loss


class Stopping(Observer):
    """Stops a run at its target accuracy, or where the best model has not changed for too long."""

    def __init__(self, experiment: Experiment) -> None:
        self._federated, self._settings = experiment.evaluation.federated, experiment.federation

    def finished(self, current: Round, state: State) -> None:
        """Put the reason to stop into the state."""
        test, settings = current.row["test_accuracy"], self._settings
        judged = current.row["validation_accuracy"] if self._federated else test
        if judged is None:
            return
        target = judged if test is None else test  # papers count rounds to a test accuracy
        if settings.target_accuracy is not None and target >= settings.target_accuracy:
            state.stopped = f"target accuracy {settings.target_accuracy:g} reached in round {current.number}"
        elif settings.patience is not None and state.stale >= settings.patience:
            state.stopped = f"no better accuracy for {state.stale} evaluations, best in round {state.best_round}"


class Tables(Observer):
    """Appends rows to metrics.csv, clients.csv and ledger.csv."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def first(self, row: Row, state: State) -> None:
        """Write round 0."""
        self._record.append("metrics.csv", [row])

    def finished(self, current: Round, state: State) -> None:
        """Write the round."""
        self._record.append("metrics.csv", [current.row])
        self._record.append("clients.csv", current.clients)
        self._record.append("ledger.csv", current.ledger)

    def ended(self) -> None:
        """Close the files."""
        self._record.close()


class Checkpoint(Observer):
    """Saves the state that a run resumes from."""

    def __init__(
        self, record: Record, experiment: Experiment, strategy: Strategy, *, secret: bool, protected: bool
    ) -> None:
        """Save into a record.

        secret: a repeated round draws another cohort and other noise; protected: updates are protected
        """
        self._record, self._experiment, self._strategy = record, experiment, strategy
        self._once = secret and experiment.privacy.noisy
        self._before_sending = protected and experiment.evaluation.federated

    def begun(self, current: Round, state: State) -> None:
        """Save the count of clients asked, so that a round that is cut off and repeated counts twice."""
        if self._once:
            self._save(state)

    def opening(self, current: Round, clients: int, state: State) -> None:
        """Save how few clients are in a sum, so that it counts even where the run is cut off with the sum seen."""
        if self._once:
            self._save(state)

    def aggregated(self, current: Round, state: State) -> None:
        """Save a protected or noisy model before anybody sees it, so that no second model of the same round is ever made."""
        if not current.skipped and (self._once or (self._before_sending and current.evaluates)):
            state.pending, state.pending_rows = current.aggregate, asdict(current.trained)
            self._save(state)
            state.pending, state.pending_rows = {}, {}

    def finished(self, current: Round, state: State) -> None:
        """Save the round."""
        self._save(state)

    def stopped(self, state: State) -> None:
        """Save why the run stops."""
        self._save(state)

    def _save(self, state: State) -> None:
        save_state(self._record, self._experiment, state, self._strategy)


class Watch(Observer):
    """Passes each row to a function."""

    def __init__(self, watch: Callable[[Row, State], None]) -> None:
        self._watch = watch

    def first(self, row: Row, state: State) -> None:
        """Show round 0."""
        self._watch(row, state)

    def finished(self, current: Round, state: State) -> None:
        """Show the round."""
        self._watch(current.row, state)
