"""The steps of a round, each alone: the model, the refusals, the observers and what they keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from helpers.support import CLIENTS, EXAMPLES, GLOBAL, LOCAL, experiment

from fedveil import Experiment, TrainingError
from fedveil.algorithms.fedavg import weighted_mean
from fedveil.core.examples import Task
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream
from fedveil.core.wire.messages import ARRAYS, METRICS, to_arrays
from fedveil.server.checkpoint import State
from fedveil.server.rounds.context import Context, Hooks
from fedveil.server.rounds.loop import run_round, run_rounds
from fedveil.server.rounds.observers import BestModel, Observer, Stopping
from fedveil.server.rounds.round import Round
from fedveil.server.strategies import make
from fedveil.simulations.engine.grid import InProcessGrid

SCORED = MetricSet.of(Task("features", (4,), ("ham", "spam")))


class Known(InProcessGrid):
    """Client k answers LOCAL[k], or what `answer` makes of it, the last client first."""

    def __init__(self, answer: Any = lambda client, weights, metrics: None) -> None:
        super().__init__(ClientApp(), CLIENTS, {})
        self.answer = answer

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        order = sorted(range(len(messages)), key=lambda i: -messages[i].metadata.dst_node_id)
        for i in order:
            client = messages[i].metadata.dst_node_id - 1
            weights = {name: value.copy() for name, value in LOCAL[client].items()}
            metrics: dict[str, Any] = {"client": client, "num-examples": int(EXAMPLES[client]), "seconds": 0.1}
            if messages[i].metadata.message_type == "train":
                metrics |= {"steps": 1, "train-loss": 0.5}
                self.answer(client, weights, metrics)
                content = RecordDict({ARRAYS: to_arrays(weights), METRICS: MetricRecord(metrics)})
            else:
                counts = dict.fromkeys(("correct", "true-positives", "false-positives", "false-negatives"), 1)
                content = RecordDict({METRICS: MetricRecord({**metrics, **counts, "loss": 0.25})})
            yield i, Message(content, reply_to=messages[i])


def context(settings: Experiment, grid: Known, folder: Path, *observers: Observer, **hooks: Any) -> Context:
    given = Hooks(lambda _row, _state: None, **hooks)
    return Context(grid, settings, make(settings, SCORED), None, given, observers, SCORED, folder)


def federated(**federation: Any) -> Experiment:
    """Nine clients that train and evaluate."""
    return Experiment(
        data={"clients": CLIENTS, "validation_fraction": 0.2}, evaluation={"federated": True},
        federation={"cohort": CLIENTS, **federation},
    )  # fmt: skip


def test_a_round_says_who_was_asked_what_came_back_and_what_was_made_of_it(tmp_path) -> None:
    state = State(GLOBAL)
    current = run_round(context(experiment("fedavg"), Known(), tmp_path), state, 0.25)
    wanted = weighted_mean(LOCAL, [int(n) for n in EXAMPLES])  # in the order of the clients, whoever answers first
    assert all((current.aggregate[name] == value).all() for name, value in wanted.items())
    assert (current.number, current.learning_rate, sorted(current.asked)) == (1, 0.25, list(range(CLIENTS)))
    assert current.trained.answered == list(range(CLIENTS))
    assert [row["client"] for row in current.ledger] == list(range(CLIENTS))
    assert all(row["bytes_up"] > 0 for row in current.ledger)
    assert state == State(GLOBAL)  # the loop alone takes a round into the state


def test_a_client_that_answers_nothing_usable_is_left_out_by_name_where_the_caller_is_lenient(tmp_path) -> None:
    def spoil(client: int, weights: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if client == 4:
            weights["dense.bias"][0] = np.nan
        if client == 2:
            metrics["train-loss"] = float("nan")

    warned: list[str] = []
    lenient = context(experiment("fedavg"), Known(spoil), tmp_path, lenient=True, warn=warned.append)
    current = run_round(lenient, State(GLOBAL), 0.1)
    assert current.trained.answered == [0, 1, 3, 5, 6, 7, 8]
    assert [text.partition(":")[2].partition(":")[0].strip() for text in warned] == ["client 2", "client 4"]
    with pytest.raises(
        TrainingError, match=r"round 1: training diverged: client 2 \(loss nan\)\n(.|\n)*kept: the model"
    ):
        run_round(context(experiment("fedavg"), Known(spoil), tmp_path), State(GLOBAL), 0.1)


def test_fewer_usable_updates_than_the_quorum_end_the_run(tmp_path) -> None:
    def short(client: int, weights: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if client < 6:
            del weights["dense.bias"]

    settings = experiment("fedavg").override({"federation.quorum": 4})
    with pytest.raises(
        TrainingError, match=r"round 1: the updates of 3 clients can be used, fewer than federation.quorum = 4"
    ):
        run_round(context(settings, Known(short), tmp_path), State(GLOBAL), 0.1)


def test_with_noise_fewer_updates_than_the_quorum_leave_the_round_out(tmp_path) -> None:
    """Whether a client's update can be used may follow from its data, and so must not decide whether the run goes on."""

    def short(client: int, weights: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if client < 6:
            del weights["dense.bias"]

    noise = {"privacy.clip": 1.0, "privacy.noise_multiplier": 1.0, "privacy.noise_at": "server"}
    settings = experiment("fedavg").override({"federation.quorum": 4, **noise})
    current = run_round(context(settings, Known(short), tmp_path), State(GLOBAL), 0.1)
    assert current.skipped == "the updates of 3 clients can be used, fewer than federation.quorum = 4"
    assert all((current.aggregate[name] == value).all() for name, value in GLOBAL.items())


def test_a_client_that_does_not_tell_what_the_algorithm_needs_is_a_failure_of_its_own(tmp_path) -> None:
    def told(client: int, weights: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if client != 3:
            metrics["global-loss"] = 0.5

    current = run_round(context(experiment("qfedavg"), Known(told), tmp_path), State(GLOBAL), 0.1)
    assert current.trained.failures == ["client 3: its reply has no number 'global-loss'"]
    assert len(current.trained.answered) == CLIENTS - 1


class Notes(Observer):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def first(self, row: Any, state: State) -> None:
        self.seen.append(("first", row["round"]))

    def begun(self, current: Round, state: State) -> None:
        self.seen.append(("begun", len(current.asked), state.round))

    def replied(self, current: Round, client: int, reply: Message) -> None:
        self.seen.append(("replied", client))

    def aggregated(self, current: Round, state: State) -> None:
        self.seen.append(("aggregated", sorted(current.aggregate), state.round))

    def evaluated(self, current: Round, client: int, reply: Message) -> None:
        self.seen.append(("evaluated", client))

    def finished(self, current: Round, state: State) -> None:
        self.seen.append(("finished", current.row["round"], state.round))

    def ended(self) -> None:
        self.seen.append(("ended",))


def test_observers_see_each_step_of_each_round_in_its_order(tmp_path) -> None:
    notes = Notes()
    run_rounds(context(federated(rounds=2), Known(), tmp_path, notes), State(GLOBAL))
    last_first = list(reversed(range(CLIENTS)))
    wanted: list[Any] = [("first", 0)]
    for number in (1, 2):
        wanted += [("begun", CLIENTS, number - 1), *(("replied", client) for client in last_first)]
        wanted += [("aggregated", sorted(GLOBAL), number - 1), *(("evaluated", client) for client in last_first)]
        wanted += [("finished", number, number)]
    assert notes.seen == [*wanted, ("ended",)]


def test_observers_change_no_byte_of_a_run(tmp_path) -> None:
    states = [State(GLOBAL), State(GLOBAL)]
    run_rounds(context(federated(rounds=3, strategy="fedadam"), Known(), tmp_path), states[0])
    run_rounds(context(federated(rounds=3, strategy="fedadam"), Known(), tmp_path, Notes()), states[1])
    for name, value in states[0].parameters.items():
        assert value.tobytes() == states[1].parameters[name].tobytes()


def finished(*accuracies: float | None, losses: dict[int, float] | None = None, **federation: Any) -> State:
    """The state after rounds of these test accuracies, and losses of 1 where none is given, seen by the best model's and the stopping observer."""
    settings = experiment("fedavg").override({f"federation.{name}": value for name, value in federation.items()})
    state, losses = State(GLOBAL), losses or {}
    for number, accuracy in enumerate(accuracies, 1):
        current = Round(number, Stream(0, number), 0.1, GLOBAL, accuracy is not None)
        current.aggregate = {"model": np.float32([number])}
        current.row = {"test_accuracy": accuracy, "test_loss": losses.get(number, 1.0)}
        for observer in (BestModel(settings), Stopping(settings)):
            observer.finished(current, state)
        if state.stopped:
            break
    return state


def test_the_best_model_is_that_of_the_first_round_with_the_highest_accuracy() -> None:
    state = finished(0.1, 0.7, None, 0.7, 0.6)
    assert (state.best_round, state.best_accuracy, state.stale) == (2, 0.7, 2)
    assert state.best_parameters["model"].tolist() == [2]


def test_of_rounds_with_the_same_accuracy_the_best_has_the_lowest_loss() -> None:
    state = finished(0.1, 0.7, 0.7, 0.7, 0.7, losses={2: 0.4, 3: 0.5, 4: 0.2, 5: float("nan")})
    assert (state.best_round, state.best_loss, state.stale) == (4, 0.2, 3)
    assert finished(0.7, 0.6, losses={1: 0.9, 2: 0.1}).best_round == 1


def test_a_run_stops_at_its_target_or_when_its_patience_is_at_an_end() -> None:
    assert finished(0.1, 0.5, 0.9, target_accuracy=0.5).stopped == "target accuracy 0.5 reached in round 2"
    assert (
        finished(0.5, 0.4, None, 0.5, 0.9, patience=2).stopped
        == "no better accuracy for 2 evaluations, best in round 1"
    )
    assert finished(0.5, 0.4, 0.6, patience=2).stopped == ""
