"""The synchronous loop: rounds one after another, from a saved state to the last round, or to a reason to stop.

Flower's own `Strategy.start` begins at round 1 and cannot be observed; this loop starts at any round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.models.local.schedules import replay
from fedveil.privacy.dp.accounting.guarantee import epsilons, exhausted
from fedveil.server.checkpoint import State
from fedveil.server.exchange import Exchanged
from fedveil.server.rounds.accounting import asked_after, shown
from fedveil.server.rounds.context import Context, to_record
from fedveil.server.rounds.evaluation import evaluate_on_clients
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.rows import metrics_row, weighted_mean
from fedveil.server.rounds.sampling import Chance
from fedveil.server.rounds.training import train


def run_rounds(context: Context, state: State) -> None:
    """Train from `state.round` to the last round, or until a stop that the settings ask for.

    Raise what `run_round` raises.
    """
    experiment, observers = context.experiment, context.observers
    schedule = replay(experiment.training, experiment.federation.rounds, state.train_losses)
    if state.round == 0 and not state.pending:
        test = context.hooks.evaluate(state.parameters) if context.hooks.evaluate else None
        row = metrics_row(experiment, context.metrics, 0, test, clip=state.clip or None)
        for observer in observers:
            observer.first(row, state)
    while state.round < experiment.federation.rounds and not state.stopped:
        if not state.pending and exhausted(experiment, shown(state), asked_after(experiment, state, 1)):
            spent = epsilons(experiment, shown(state))["epsilon"]
            state.stopped = (
                f"another round could spend more than privacy.epsilon = {experiment.privacy.epsilon:g}; "
                f"{spent:.4g} is spent after {state.round} rounds"
            )
            for observer in observers:
                observer.stopped(state)
            break
        started = time.perf_counter()
        current = run_round(context, state, schedule.rate)
        _advance(context, state, current)
        schedule.advance(state.train_losses[-1])
        state.seconds += time.perf_counter() - started
        for observer in observers:
            observer.finished(current, state)
    for observer in observers:
        observer.ended()


def run_round(context: Context, state: State, learning_rate: float) -> Round:
    """Run the round after the state's: ask a cohort, make the next model from its updates, and evaluate it.

    If the run was cut off after the model was made, the round continues with that model.
    Raise TrainingError where no client replies, or one diverges; ProtectionError where a protected round is impossible;
    Interrupted where the user stops the run.
    """
    experiment, number = context.experiment, state.round + 1
    evaluates = number % experiment.evaluation.every == 0 or number == experiment.federation.rounds
    current = Round(
        number, Stream(experiment.seed, number), learning_rate, state.parameters,
        evaluates or _last_within_budget(experiment, state), state.made, state.clip or None,
    )  # fmt: skip
    with context.named(number):
        if state.pending:
            current.aggregate, current.trained = state.pending, Exchanged(**state.pending_rows)
            state.pending, state.pending_rows = {}, {}
        else:
            _make_model(context, current, state)
        if evaluates and experiment.evaluation.federated:
            evaluate_on_clients(context, current)
        if current.evaluates and context.hooks.evaluate:
            current.test = context.hooks.evaluate(current.aggregate)
    return current


def _make_model(context: Context, current: Round, state: State) -> None:
    """Draw the cohort, train it, and notify the observers of both."""
    noisy, secret = context.experiment.privacy.noisy, context.hooks.secret
    chance = Chance(None if secret and noisy else current.stream, state.turns or context.experiment.seed)
    if noisy:
        current.population = len(cast(Sequence[int], context.grid.get_node_ids()))
    model = to_record(current.model, context.experiment.privacy.protection.name)
    messages = context.strategy.train_messages(current.number, model, context.config(current), context.grid, chance)
    federation = context.experiment.federation
    if current.number == 1 and federation.sampling == "fixed" and len(messages) != federation.cohort:
        context.hooks.warn(
            f"round 1: {federation.strategy} asks {len(messages)} clients, and federation.cohort = {federation.cohort}"
        )
    current.asked = [message.metadata.dst_node_id - 1 for message in messages]  # node id k+1 is client k
    for observer in context.observers:
        observer.begun(current, state)
    train(context, current, messages, state)
    for reason in current.trained.failures:
        context.hooks.warn(f"round {current.number}: {reason}")
    if current.skipped:
        context.hooks.warn(f"round {current.number}: left out, and the model stays as it is: {current.skipped}")
    for observer in context.observers:
        observer.aggregated(current, state)


def _last_within_budget(experiment: Experiment, state: State) -> bool:
    """Say whether the round after the next might spend more than privacy.epsilon, so that the next may be the last."""
    spent = shown(state)
    fewest = spent.fewest or experiment.federation.cohort
    after = replace(spent, rounds=spent.rounds + 1, asked=spent.asked + 1, fewest=fewest)
    return exhausted(experiment, after, asked_after(experiment, state, 2))


def _advance(context: Context, state: State, current: Round) -> None:
    """Put a complete round into the state."""
    experiment = context.experiment
    quiet = experiment.privacy.noisy or current.skipped
    loss = None if quiet else weighted_mean(current.trained.clients, "train_loss")
    state.round, state.parameters = current.number, current.aggregate
    if not current.skipped:
        state.made = current.number
    state.train_losses.append(math.nan if loss is None else loss)
    state.bytes_down += sum(row["bytes_down"] for row in current.ledger)
    state.bytes_up += sum(row["bytes_up"] or 0 for row in current.ledger)
    current.row = metrics_row(
        experiment, context.metrics, current.number, current.test, current.validation, loss, current.learning_rate,
        current.trained, current.told, state.clip or None,
    )  # fmt: skip
    current.row |= epsilons(experiment, shown(state))
