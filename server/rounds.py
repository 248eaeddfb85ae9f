"""The round loop: drives any Flower `Strategy` over any Flower `Grid`, and keeps what every round made.

Flower's own `Strategy.start` begins at round 1 and cannot be observed; this loop starts at any round, from a
`State`, and leaves a record and a checkpoint after each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedveil.core.errors import TrainingError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import ARRAYS, CLIENT, METRICS, WEIGHT, from_arrays, to_arrays, wire_bytes
from fedveil.core.randomness import Stream, global_random
from fedveil.core.record import Record
from fedveil.models.evaluation import Scores
from fedveil.models.schedules import replay
from fedveil.server.checkpoint import Parameters, State, save_state

Row = dict[str, Any]


@dataclass
class Exchanged:
    """What the record keeps of the messages of one stage of a round.

    answered: clients that replied
    failures: the reason of each message that has no reply
    ledger, clients: rows of ledger.csv, one for each message sent, and of clients.csv, one for each reply
    """

    answered: list[int]
    failures: list[str]
    ledger: list[Row]
    clients: list[Row]


def run_rounds(
    grid: Grid,
    experiment: Experiment,
    strategy: Strategy,
    state: State,
    record: Record,
    *,
    evaluate: Callable[[Parameters], Scores] | None,
    binary: bool,
    watch: Callable[[Row, State], None],
    timeout: float = 3600.0,
) -> None:
    """Train from `state.round` to the last round, or until a stop that the settings ask for.

    evaluate: scores of a model on the server's test data; None where it has none
    watch: is shown the row of each round as it enters metrics.csv
    timeout: seconds to wait for a round's replies
    Raises TrainingError where no client replies, or one diverges; Interrupted where the user stops the run.
    """
    schedule = replay(experiment.training, experiment.federation.rounds, state.train_losses)
    if state.round == 0:
        row = _row(experiment, binary, 0, evaluate(state.parameters) if evaluate else None)
        record.append("metrics.csv", [row])
        watch(row, state)
    while state.round < experiment.federation.rounds and not state.stopped:
        started = time.perf_counter()
        number = state.round + 1
        stream = Stream(experiment.seed, number)
        rate = schedule.rate
        with global_random(stream, "sampling"):
            messages = strategy.configure_train(
                number, to_arrays(state.parameters), ConfigRecord({"learning-rate": rate}), grid
            )
        parameters, trained = _train(grid, list(messages), number, experiment, strategy, record, timeout)
        del messages  # what it weighs is not needed while clients evaluate

        due = number % experiment.evaluation.every == 0 or number == experiment.federation.rounds
        validation, evaluated = None, Exchanged([], [], [], [])
        if due and experiment.evaluation.federated:
            with global_random(stream, "evaluation sampling"):
                messages = strategy.configure_evaluate(number, to_arrays(parameters), ConfigRecord(), grid)
            validation, evaluated = _evaluate(grid, list(messages), number, strategy, record, timeout)
        test = evaluate(parameters) if due and evaluate else None

        # the round is whole: from here on it counts
        loss = _mean(trained.clients, "train_loss")
        state.round, state.parameters = number, parameters
        state.train_losses.append(loss)
        schedule.advance(loss)
        ledger = trained.ledger + evaluated.ledger
        state.bytes_down += sum(row["bytes_down"] for row in ledger)
        state.bytes_up += sum(row["bytes_up"] or 0 for row in ledger)
        row = _row(experiment, binary, number, test, validation, loss, rate, trained)
        if due:
            _judge(experiment, state, row)
        state.seconds += time.perf_counter() - started

        record.append("metrics.csv", [row])
        record.append("clients.csv", trained.clients + evaluated.clients)
        record.append("ledger.csv", ledger)
        save_state(record, experiment, state, strategy)
        watch(row, state)
    record.close()


def _train(
    grid: Grid,
    messages: list[Message],
    number: int,
    experiment: Experiment,
    strategy: Strategy,
    record: Record,
    timeout: float,
) -> tuple[Parameters, Exchanged]:
    """The next global model; the clients' weights are let go when this returns, so that their memory serves again."""
    exchanged, replies = _exchange(grid, messages, number, "train", timeout, record)
    exchanged.clients += _train_rows(replies, number)
    if any(not math.isfinite(row["train_loss"]) for row in exchanged.clients):
        _refuse_divergence(replies, number, record)
    parameters = _aggregate(strategy, replies, exchanged.failures, number, experiment, record)
    if not all(_is_finite(value) for value in parameters.values()):
        _refuse_divergence(replies, number, record)
        raise TrainingError(
            f"training diverged: the model that {experiment.federation.strategy} made in round {number} is not finite, and "
            f"the clients' were{_kept(number, record)}\n  try a smaller federation.server_learning_rate"
        )
    return parameters, exchanged


def _evaluate(
    grid: Grid, messages: list[Message], number: int, strategy: Strategy, record: Record, timeout: float
) -> tuple[MetricRecord | None, Exchanged]:
    """The scores over all that clients hold out."""
    exchanged, replies = _exchange(grid, messages, number, "evaluate", timeout, record)
    exchanged.clients += _evaluate_rows(replies, number)
    return strategy.aggregate_evaluate(number, replies), exchanged


def _exchange(
    grid: Grid, messages: list[Message], number: int, stage: str, timeout: float, record: Record
) -> tuple[Exchanged, list[Message]]:
    """Send messages, wait for the replies, order them by client, and account for both ways."""
    weights = {id(m.content): wire_bytes(m.content) for m in {id(m.content): m for m in messages}.values()}
    sent = {m.metadata.dst_node_id - 1: weights[id(m.content)] for m in messages}  # node id k+1 is client k
    replies: dict[int, Message] = {}
    errors: list[str] = []
    try:
        answers = list(grid.send_and_receive(messages, timeout=timeout))
    except TrainingError as error:  # the in-process engine's, where a client's own code failed
        raise TrainingError(f"round {number}: {error}{_kept(number, record)}") from error
    for reply in answers:
        if reply.has_error():
            errors.append(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
        else:
            replies[int(_metric(reply, CLIENT))] = reply
    silent = len(sent) - len(replies) - len(errors)
    ledger: list[Row] = [
        {
            "round": number,
            "stage": stage,
            "client": client,
            "bytes_down": sent[client],
            "bytes_up": wire_bytes(replies[client].content) if client in replies else None,
            "seconds": round(_metric(replies[client], "seconds"), 6) if client in replies else None,
        }
        for client in sorted(sent)
    ]
    answered = sorted(replies)  # sums run in a fixed order, whoever answers first
    exchanged = Exchanged(answered, errors + ["no answer in time"] * silent, ledger, [])
    return exchanged, [replies[client] for client in answered]


def _aggregate(
    strategy: Strategy,
    replies: list[Message],
    failures: list[str],
    number: int,
    experiment: Experiment,
    record: Record,
) -> Parameters:
    """The next global model, float32; raise TrainingError where there is none."""
    name = experiment.federation.strategy
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error, said below
            aggregate, _ = strategy.aggregate_train(number, replies)
    except AppExitException as error:
        raise TrainingError(f"round {number}: {name} cannot aggregate: {error}") from error
    if aggregate is None:
        raise TrainingError(
            f"round {number}: {name} made no model of {len(replies)} replies"
            + "".join(f"\n  {reason}" for reason in failures[:3])
            + _kept(number, record)
        )
    # some of Flower's strategies answer in float64, and a number too large for float32 becomes infinite here
    with np.errstate(over="ignore"):
        # a copy: some answer with a client's own arrays (Krum), whose memory serves again in the next round
        return {key: np.array(value, np.float32) for key, value in from_arrays(aggregate).items()}


def _kept(number: int, record: Record) -> str:
    return f"\n  kept: the model and metrics of rounds up to {number - 1}, in {record.folder}"


def _metric(reply: Message, key: str) -> float:
    return float(cast(float, cast(MetricRecord, reply.content[METRICS])[key]))


CLIENT_COLUMNS = (
    "round", "client", "stage", "examples", "steps", "train_loss", "validation_loss", "validation_accuracy",
)  # fmt: skip


def _train_rows(replies: list[Message], number: int) -> list[Row]:
    """Rows of clients.csv about training."""
    return [
        dict.fromkeys(CLIENT_COLUMNS)
        | {
            "round": number,
            "client": int(_metric(reply, CLIENT)),
            "stage": "train",
            "examples": int(_metric(reply, WEIGHT)),
            "steps": int(_metric(reply, "steps")),
            "train_loss": _metric(reply, "train-loss"),
        }
        for reply in replies
    ]


def _evaluate_rows(replies: list[Message], number: int) -> list[Row]:
    """Rows of clients.csv about evaluation on what clients hold out."""
    return [
        dict.fromkeys(CLIENT_COLUMNS)
        | {
            "round": number,
            "client": int(_metric(reply, CLIENT)),
            "stage": "evaluate",
            "examples": int(_metric(reply, WEIGHT)),
            "validation_loss": _metric(reply, "loss"),
            "validation_accuracy": _metric(reply, "correct") / _metric(reply, WEIGHT),
        }
        for reply in replies
    ]


def _mean(clients: list[Row], key: str) -> float:
    examples = sum(row["examples"] for row in clients)
    return sum(row["examples"] * row[key] for row in clients) / examples if examples else math.nan


def _refuse_divergence(replies: list[Message], number: int, record: Record) -> None:
    """Raise TrainingError for the first client whose loss or weights are not finite."""
    for reply in replies:
        loss = _metric(reply, "train-loss")
        arrays = from_arrays(cast(Any, reply.content[ARRAYS])).values()
        if not math.isfinite(loss) or not all(_is_finite(array) for array in arrays):
            raise TrainingError(
                f"training diverged: client {int(_metric(reply, CLIENT))} in round {number} (loss {loss:g})"
                f"{_kept(number, record)}\n  try a smaller training.learning_rate, or training.max_grad_norm"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are; a sum of squares tells in a third of the time, unless it is itself too large."""
    flat = array.reshape(-1)
    return math.isfinite(float(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


def columns(experiment: Experiment, binary: bool) -> list[str]:
    """The columns of metrics.csv, which depend on the settings alone."""
    scores = ["loss", "accuracy", *(["precision", "recall", "f1"] if binary else [])]
    return [
        "round",
        "learning_rate",
        "clients",
        "failures",
        "train_loss",
        *(f"test_{name}" for name in [*scores, *(["auc"] if binary else [])]),
        *(f"validation_{name}" for name in scores if experiment.evaluation.federated),
    ]


def _row(
    experiment: Experiment,
    binary: bool,
    number: int,
    test: Scores | None,
    validation: MetricRecord | None = None,
    loss: float | None = None,
    rate: float | None = None,
    trained: Exchanged | None = None,
) -> Row:
    values: Row = {
        "round": number,
        "learning_rate": rate,
        "clients": len(trained.answered) if trained else None,
        "failures": len(trained.failures) if trained else None,
        "train_loss": loss,
        **{f"test_{name}": value for name, value in (test.as_metrics(binary) if test else {}).items()},
        **{f"validation_{name}": value for name, value in (validation or {}).items()},
    }
    return {name: values.get(name) for name in columns(experiment, binary)}


def _judge(experiment: Experiment, state: State, row: Row) -> None:
    """Keep the best model, and say whether to stop: on validation where clients hold some out, else on test data."""
    settings = experiment.federation
    accuracy = row["validation_accuracy" if experiment.evaluation.federated else "test_accuracy"]
    if accuracy is None:
        return
    if accuracy > state.best_accuracy:
        state.best_round, state.best_accuracy, state.best_parameters = row["round"], accuracy, state.parameters
        state.stale = 0
    else:
        state.stale += 1
    target = accuracy if row["test_accuracy"] is None else row["test_accuracy"]
    if settings.target_accuracy is not None and target >= settings.target_accuracy:
        state.stopped = f"target accuracy {settings.target_accuracy:g} reached in round {row['round']}"
    elif settings.patience is not None and state.stale >= settings.patience:
        state.stopped = f"no better accuracy for {state.stale} evaluations, best in round {state.best_round}"
