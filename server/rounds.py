"""The round loop: drives any Flower `Strategy` over any Flower `Grid`, and keeps what every round made.

Flower's own `Strategy.start` begins at round 1 and cannot be observed; this loop starts at any round, from a
`State`, and leaves a record and a checkpoint after each.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedveil.core.errors import ProtectionError, TrainingError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import ARRAYS, CLIENT, RUN, SEALED, WEIGHT, from_arrays, to_arrays, to_sealed
from fedveil.core.randomness import Stream, global_random
from fedveil.core.record import Record
from fedveil.models.evaluation import Scores
from fedveil.models.schedules import replay
from fedveil.privacy.accounting import Shown, epsilons
from fedveil.server.captures import Capture
from fedveil.server.checkpoint import Parameters, State, save_state
from fedveil.server.exchange import Exchanged, Row, exchange, metric
from fedveil.server.gathering import Gathering, gather
from fedveil.server.noise import ServerNoise, server_noise
from fedveil.server.rows import evaluate_rows, metrics_row, train_rows, weighted_mean
from fedveil.server.side import ServerSide

# whole numbers in a reply, and the least of each
TRAINED = {WEIGHT: 1, "steps": 0}
EVALUATED = {WEIGHT: 1, **dict.fromkeys(("correct", "true-positives", "false-positives", "false-negatives"), 0)}
ATTEMPTS = 3  # at a round of secure aggregation that too many clients left


@dataclass(frozen=True)
class Hooks:
    """What is done between rounds.

    watch: is shown the row of each round as it enters metrics.csv
    evaluate: scores of a model on the server's test data; None where it has none, or cannot read the model
    warn: is told why a client was left out
    lenient: a client whose update is not finite is left out, as other machines may send anything; else the run ends there
    secret: where the run has noise, the server's, and who takes part, come from the operating system's generator: clients on
        other machines know the seed
    inspect: a simulation's own look at a protected model and the clients in it: how far it lies from their plain mean
    """

    watch: Callable[[Row, State], None]
    evaluate: Callable[[Parameters], Scores] | None = None
    warn: Callable[[str], None] = lambda _text: None
    inspect: Callable[[Parameters, Sequence[int]], float] | None = None
    lenient: bool = False
    secret: bool = False


def run_rounds(
    grid: Grid,
    experiment: Experiment,
    strategy: Strategy,
    state: State,
    record: Record,
    *,
    side: ServerSide | None,
    hooks: Hooks,
    binary: bool,
    timeout: float,
) -> None:
    """Train from `state.round` to the last round, or until a stop that the settings ask for.

    side: the server's side of a protection; None where updates travel in the clear
    timeout: seconds to wait for a round's replies
    Raises TrainingError where no client replies, or one diverges; ProtectionError where a protected round cannot be done;
    Interrupted where the user stops the run.
    """
    evaluate, noisy = hooks.evaluate, experiment.privacy.noisy
    capture = Capture(experiment, record) if experiment.federation.capture else None
    schedule = replay(experiment.training, experiment.federation.rounds, state.train_losses)
    if state.round == 0 and not state.pending:
        row = metrics_row(experiment, binary, 0, evaluate(state.parameters) if evaluate else None)
        record.append("metrics.csv", [row])
        hooks.watch(row, state)
    while state.round < experiment.federation.rounds and not state.stopped:
        started = time.perf_counter()
        number = state.round + 1
        stream = Stream(experiment.seed, number)
        rate = schedule.rate
        config: dict[str, Any] = {"learning-rate": rate} | ({RUN: bytes.fromhex(state.run)} if side else {})
        due = number % experiment.evaluation.every == 0 or number == experiment.federation.rounds
        if state.pending:
            parameters, trained = state.pending, Exchanged(**state.pending_rows)
            state.pending, state.pending_rows = {}, {}
        else:
            drawn = Stream(secrets.randbits(63), number) if hooks.secret and noisy else stream
            there = len(cast(Sequence[int], grid.get_node_ids())) if noisy else 0
            with global_random(drawn, "sampling"):
                messages = strategy.configure_train(number, _to_record(state, experiment), ConfigRecord(config), grid)
            if noisy:
                messages = list(messages)
                _count_asked(state, messages, there)
                if hooks.secret:
                    # stored before they are asked: a round that is cut off and asked again shows a client's update twice
                    save_state(record, experiment, state, strategy)
            noise = server_noise(experiment, number, secret=hooks.secret)
            if capture:
                capture.begin(state.parameters, rate)
            parameters, trained, gathering = _train(
                grid,
                list(messages),
                number,
                experiment,
                strategy,
                side,
                record,
                timeout,
                capture,
                noise,
                lenient=hooks.lenient,
            )
            if noisy:
                state.fewest = min(state.fewest or len(trained.answered), len(trained.answered))
            del messages  # what it weighs is not needed while clients evaluate
            for reason in trained.failures:
                hooks.warn(f"round {number}: {reason}")
            if side:
                with _named(number, record):
                    seen = gathering.mean or parameters
                    error = hooks.inspect(seen, trained.answered) if hooks.inspect else None
                _account(state, trained, error, gathering.bound)
            if side and due and experiment.evaluation.federated:
                # an aggregate is made once: stored before it is sent, so that no second one of the same round ever is
                state.pending, state.pending_rows = parameters, asdict(trained)
                save_state(record, experiment, state, strategy)
                state.pending, state.pending_rows = {}, {}

        validation, evaluated = None, Exchanged()
        if due and experiment.evaluation.federated:
            model = (
                to_sealed(parameters[SEALED].tobytes(), experiment.privacy.protection.name)
                if SEALED in parameters
                else None
            )
            with global_random(stream, "evaluation sampling"):
                messages = strategy.configure_evaluate(
                    number, model or to_arrays(parameters), ConfigRecord(config), grid
                )
            validation, evaluated = _evaluate(
                grid, list(messages), number, strategy, record, timeout, capture, protected=side is not None
            )
            for reason in evaluated.failures:
                hooks.warn(f"round {number}: {reason}")
        with _named(number, record):
            test = evaluate(parameters) if due and evaluate else None

        if capture:
            capture.write(number, parameters)
        # the round is whole: from here on it counts
        loss = None if noisy else weighted_mean(trained.clients, "train_loss")
        state.round, state.parameters = number, parameters
        state.train_losses.append(math.nan if loss is None else loss)
        schedule.advance(state.train_losses[-1])
        ledger = trained.ledger + evaluated.ledger
        state.bytes_down += sum(row["bytes_down"] for row in ledger)
        state.bytes_up += sum(row["bytes_up"] or 0 for row in ledger)
        row = metrics_row(experiment, binary, number, test, validation, loss, rate, trained)
        row |= epsilons(experiment, shown(state))
        if due:
            _judge(experiment, state, row)
        state.seconds += time.perf_counter() - started

        record.append("metrics.csv", [row])
        record.append("clients.csv", trained.clients + evaluated.clients)
        record.append("ledger.csv", ledger)
        save_state(record, experiment, state, strategy)
        hooks.watch(row, state)
    record.close()


def _to_record(state: State, experiment: Experiment) -> ArrayRecord:
    """The model as it travels."""
    if SEALED in state.parameters:
        return to_sealed(state.parameters[SEALED].tobytes(), experiment.privacy.protection.name)
    return to_arrays(state.parameters)


def _train(
    grid: Grid,
    messages: list[Message],
    number: int,
    experiment: Experiment,
    strategy: Strategy,
    side: ServerSide | None,
    record: Record,
    timeout: float,
    capture: Capture | None,
    noise: ServerNoise | None,
    *,
    lenient: bool,
) -> tuple[Parameters, Exchanged, Gathering]:
    """The next global model; the clients' weights are let go when this returns, so that their memory serves again."""
    whole = Exchanged()

    def converse(
        sent: Sequence[Message],
        stage: str,
        take: Callable[[int, Message], None] = lambda _client, _reply: None,
        numbers: Sequence[str] = (),
        counts: Mapping[str, int] | None = None,
    ) -> tuple[Exchanged, list[Message]]:
        with _named(number, record):
            exchanged, replies = exchange(grid, sent, number, stage, timeout, take, numbers, counts)
        whole.ledger += exchanged.ledger
        whole.failures += exchanged.failures
        return exchanged, replies

    noisy = experiment.privacy.noisy
    numbers = (*(() if noisy else ("train-loss",)), *(("seal-seconds", "open-seconds") if side else ()))
    counts = ({WEIGHT: 1} if noisy else TRAINED) | ({"clipped": 0} if side else {})
    for attempt in range(ATTEMPTS):
        gathering = gather(strategy, side, number, attempt, converse, experiment, noise)
        try:
            take = _finite(gathering.take, tells=not noisy) if lenient else gathering.take
            if capture:
                take = _seen(capture.saw, take)
            exchanged, replies = converse(gathering.ask(messages), "train", take, numbers, counts)
            _check_quorum(experiment, len(replies), whole.failures, number, record)
            rows = train_rows(replies, number, protected=side is not None, tells=not noisy)
            if not noisy and any(not math.isfinite(row["train_loss"]) for row in rows):
                _refuse_divergence(replies, number, record)
            parameters = _aggregate(gathering, replies, whole.failures, number, experiment, record)
        except ProtectionError as error:
            if attempt + 1 < ATTEMPTS and not gathering.final:
                whole.failures.append(f"abandoned with nothing revealed, and tried again: {error}")
                continue
            raise ProtectionError(
                f"round {number}: {error}" + _reasons(whole.failures) + _kept(number, record)
            ) from error
        whole.answered, whole.clients = exchanged.answered, rows
        break
    if SEALED not in parameters and not all(_is_finite(value) for value in parameters.values()):
        if not noisy:
            _refuse_divergence(replies, number, record)
        raise TrainingError(
            f"training diverged: the model that {experiment.federation.strategy} made in round {number} is not finite, and "
            f"the clients' were{_kept(number, record)}\n  try a smaller federation.server_learning_rate"
        )
    return parameters, whole, gathering


def _seen(saw: Callable[[int, Message], None], take: Callable[[int, Message], None]) -> Callable[[int, Message], None]:
    """`take`, of replies that were looked at before."""

    def both(client: int, reply: Message) -> None:
        saw(client, reply)
        take(client, reply)

    return both


def _finite(take: Callable[[int, Message], None], *, tells: bool) -> Callable[[int, Message], None]:
    """`take`, for updates that are finite; others are a failure of their client alone. tells: clients tell their losses."""

    def look(client: int, reply: Message) -> None:
        if tells and not math.isfinite(metric(reply, "train-loss")):
            raise ProtectionError(f"its training diverged (loss {metric(reply, 'train-loss'):g})")
        take(client, reply)
        arrays = reply.content.get(ARRAYS)  # gone where an update was a ciphertext
        if isinstance(arrays, ArrayRecord) and not all(_is_finite(value) for value in from_arrays(arrays).values()):
            raise ProtectionError("its weights are not finite: its training diverged")

    return look


def _check_quorum(experiment: Experiment, answered: int, failures: Sequence[str], number: int, record: Record) -> None:
    """Raise TrainingError where too few clients' updates can be used."""
    quorum = experiment.federation.quorum
    if quorum is not None and answered < quorum:
        raise TrainingError(
            f"round {number}: the updates of {answered} clients can be used, fewer than federation.quorum = {quorum}"
            + _reasons(failures)
            + _kept(number, record)
        )


def _evaluate(
    grid: Grid,
    messages: list[Message],
    number: int,
    strategy: Strategy,
    record: Record,
    timeout: float,
    capture: Capture | None,
    *,
    protected: bool,
) -> tuple[MetricRecord | None, Exchanged]:
    """The scores over all that clients hold out."""
    with _named(number, record):
        take = capture.evaluated if capture else lambda _client, _reply: None
        exchanged, replies = exchange(grid, messages, number, "evaluate", timeout, take, ("loss",), EVALUATED)
    exchanged.clients = evaluate_rows(replies, number, protected=protected)
    return strategy.aggregate_evaluate(number, replies), exchanged


def _aggregate(
    gathering: Gathering,
    replies: list[Message],
    failures: list[str],
    number: int,
    experiment: Experiment,
    record: Record,
) -> Parameters:
    """The next global model, float32 or a ciphertext; raise TrainingError where there is none."""
    name = experiment.federation.strategy
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error, said below
            aggregate = gathering.finish(number, replies)
    except AppExitException as error:
        raise TrainingError(f"round {number}: {name} cannot aggregate: {error}") from error
    if aggregate is None:
        raise TrainingError(
            f"round {number}: {name} made no model of {len(replies)} replies"
            + _reasons(failures)
            + _kept(number, record)
        )
    if SEALED in aggregate:
        return aggregate
    # some of Flower's strategies answer in float64, and a number too large for float32 becomes infinite here
    with np.errstate(over="ignore"):
        # a copy: some answer with a client's own arrays (Krum), whose memory serves again in the next round
        return {key: np.array(value, np.float32) for key, value in aggregate.items()}


def _count_asked(state: State, messages: Sequence[Message], population: int) -> None:
    """Count whom a round asks for an update, of so many that were there; what answers may be seen, and is never unseen."""
    for message in messages:
        client = message.metadata.dst_node_id - 1
        state.asked[client] = state.asked.get(client, 0) + 1
    state.population = min(state.population or population, population)
    state.drawn = max(state.drawn, len(messages))


def shown(state: State) -> Shown:
    """What a run with noise has shown so far."""
    return Shown(state.round, max(state.asked.values(), default=0), state.fewest, state.population, state.drawn)


def _account(state: State, trained: Exchanged, largest_error: float | None, bound: float) -> None:
    """Add a protected round's costs to the run's."""
    costs = state.costs
    stages = sum(row["seconds"] or 0.0 for row in trained.ledger if row["stage"] != "train")
    costs["seal_seconds"] = costs.get("seal_seconds", 0.0) + stages
    costs["error_bound"] = max(costs.get("error_bound", 0.0), bound)
    for key in ("seal_seconds", "open_seconds"):
        costs[key] = costs.get(key, 0.0) + sum(row.pop(key) for row in trained.clients)
    costs["clipped"] = costs.get("clipped", 0) + sum(row["clipped"] for row in trained.clients)
    if largest_error is not None:
        costs["largest_error"] = max(costs.get("largest_error", 0.0), largest_error)


def _reasons(failures: Sequence[str]) -> str:
    return "".join(f"\n  {reason}" for reason in failures[:3])


@contextmanager
def _named(number: int, record: Record) -> Iterator[None]:
    """Let an error say in which round it came, and what is kept."""
    try:
        yield
    except (TrainingError, ProtectionError) as error:
        raise type(error)(f"round {number}: {error}{_kept(number, record)}") from error


def _kept(number: int, record: Record) -> str:
    return f"\n  kept: the model and metrics of rounds up to {number - 1}, in {record.folder}"


def _refuse_divergence(replies: list[Message], number: int, record: Record) -> None:
    """Raise TrainingError for the first client whose loss or weights are not finite."""
    for reply in replies:
        loss = metric(reply, "train-loss")
        arrays = from_arrays(cast(ArrayRecord, reply.content.get(ARRAYS, ArrayRecord()))).values()
        if not math.isfinite(loss) or not all(_is_finite(array) for array in arrays):
            raise TrainingError(
                f"training diverged: client {int(metric(reply, CLIENT))} in round {number} (loss {loss:g})"
                f"{_kept(number, record)}\n  try a smaller training.learning_rate, or training.max_grad_norm"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are; a sum of squares tells in a third of the time, unless it is itself too large."""
    flat = array.reshape(-1)
    return math.isfinite(float(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


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
