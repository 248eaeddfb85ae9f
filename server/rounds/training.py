"""Training in a round, from its messages to its next model: exchange, checks, aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, Message

from fedveil.algorithms.algorithm import Cohort
from fedveil.core.errors import ProtectionError, TrainingError
from fedveil.core.wire.messages import ARRAYS, CLIENT, WEIGHT, from_arrays
from fedveil.privacy.dp.accounting.guarantee import overspent
from fedveil.privacy.dp.cohorts import cohort_sizes
from fedveil.server.checkpoint import Parameters, State
from fedveil.server.exchange import Exchanged, exchange, metric
from fedveil.server.protection.collector import Collected
from fedveil.server.protection.collectors import new_collector
from fedveil.server.protection.noise import NoisySum, noisy_sum
from fedveil.server.protection.server_protection import TooFew
from fedveil.server.rounds.accounting import shown
from fedveil.server.rounds.context import Context
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.rows import train_rows

# metrics of a reply that are whole numbers, and the least of each
TRAINED = {WEIGHT: 1, "steps": 0}
ATTEMPTS = 3  # attempts at a round of secure aggregation that too many clients left


def train(context: Context, current: Round, messages: list[Message], state: State) -> None:
    """Ask a cohort for updates, and make the round's next model from them.

    The clients' weights are freed when this returns, so that their memory is reused.
    A round with noise that has too few clients for its protection is left out, and says why: whether a run goes on must
    not depend on who answers. So is one of a cohort that chance made too small or too large.
    Raise TrainingError where no client replies, or one diverges; ProtectionError where a protected round is impossible.
    """
    experiment, whole = context.experiment, current.trained
    noisy, protected = experiment.privacy.noisy, context.protection is not None
    changed = noisy_sum(
        experiment,
        current.number,
        current.model,
        len(messages),
        current.clip,
        context.draw,
        learning_rate=current.learning_rate,
        secret=context.hooks.secret,
    )

    def converse(
        sent: Sequence[Message],
        stage: str,
        take: Callable[[int, Message], None] = lambda _client, _reply: None,
        numbers: Sequence[str] = (),
        counts: Mapping[str, int] | None = None,
    ) -> tuple[Exchanged, list[Message]]:
        account, replies = exchange(context.grid, sent, current.number, stage, context.timeout, take, numbers, counts)
        whole.ledger += account.ledger
        whole.failures += account.failures
        return account, replies

    def take(client: int, reply: Message) -> None:
        for observer in context.observers:
            observer.replied(current, client, reply)
        if context.hooks.lenient and not noisy:
            _check_loss(reply)
        collector.take(client, reply)
        if context.hooks.lenient:
            _check_weights(reply)

    def opening(clients: int) -> None:
        if clients and overspent(experiment, shown(state), clients):
            raise TooFew(
                f"a sum of {clients:,} clients has the noise of so many, and would spend more than privacy.epsilon = "
                f"{experiment.privacy.epsilon:g}"
            )
        for observer in context.observers:
            observer.opening(current, clients, state)

    current.aggregate, current.skipped = current.model, _unfit(context, messages, changed)
    if current.skipped:
        return
    numbers = (() if noisy else ("train-loss",)) + (("seal-seconds", "open-seconds") if protected else ())
    counts = ({WEIGHT: 1} if noisy else TRAINED) | ({"clipped": 0} if protected else {})
    for attempt in range(ATTEMPTS):
        collector = new_collector(experiment, context.protection, current.number, attempt, converse, changed, opening)
        try:
            asked = collector.ask(messages)
            account, replies = converse(asked, "train", take, (*numbers, *context.strategy.reports), counts)
            if short := _below_quorum(experiment.federation.quorum, len(replies)):
                if noisy:  # whether the run goes on must not follow from who answers
                    current.skipped = short
                    return
                raise TrainingError(f"{short}{_reasons(whole.failures)}")
            rows = train_rows(replies, current.number, protected=protected, tells=not noisy)
            if not noisy and any(not math.isfinite(row["train_loss"]) for row in rows):
                _refuse_divergence(replies)
            collected = collector.finish(replies)
        except ProtectionError as error:
            if attempt + 1 < ATTEMPTS and not collector.final:
                whole.failures.append(f"abandoned with nothing revealed, and tried again: {error}")
                continue
            if noisy and (isinstance(error, TooFew) or not collector.final):
                current.skipped = str(error)
                return
            raise ProtectionError(f"{error}{_reasons(whole.failures)}") from error
        break
    if noisy and not replies and changed is None:
        current.skipped = f"no client sent an update{_reasons(whole.failures)}"
        return
    whole.answered, whole.clients = account.answered, rows
    current.aggregate = _aggregate(context, current, collected)
    current.mean, current.bound, current.told = collected.mean, collected.bound, context.strategy.told
    current.within = collected.within
    if collected.sealed is None and not all(_is_finite(value) for value in current.aggregate.values()):
        if not noisy:
            _refuse_divergence(replies)
        raise TrainingError(
            f"training diverged: the model that {experiment.federation.strategy} made in round {current.number} is not finite, "
            "and the clients' were\n  try a smaller federation.strategy.learning_rate"
        )


def _unfit(context: Context, messages: Sequence[Message], changed: NoisySum | None) -> str:
    """Return why a cohort makes no model, before it is asked; empty where it may.

    A noisy sum of nobody is released as any other: that a Poisson cohort is empty would tell of the clients.
    """
    federation, clients = context.experiment.federation, context.experiment.data.clients
    if context.protection is not None:
        fewest, most = cohort_sizes(federation, clients)
        fewest = max(fewest, context.protection.plan.least)
        if federation.sampling == "poisson" and not fewest <= len(messages) <= most:
            return f"its cohort has {len(messages):,} clients, and its protection is made for {fewest:,} to {most:,}"
        return "" if messages else "none of its clients is connected"
    return "" if messages or changed is not None else "it has no clients"


def _aggregate(context: Context, current: Round, collected: Collected) -> Parameters:
    """Return the next global model, float32 or a ciphertext; raise TrainingError where there is none."""
    if collected.sealed is not None:
        return collected.sealed
    settings = context.experiment.federation
    cohort = Cohort(current.model, collected.contributions, current.learning_rate, settings.cohort)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller raises an error where the model is not finite
        made = context.strategy.aggregate(current.number, cohort) if cohort.contributions else None
        if made is None:
            raise TrainingError(
                f"{settings.strategy} made no model of {len(cohort.contributions)} replies"
                + _reasons(current.trained.failures)
            )
        # a number too large for float32 becomes infinite here; copied, because a strategy may return a client's own
        # arrays, whose memory is reused in the next round
        return {name: np.array(value, np.float32) for name, value in made.items()}


def _check_loss(reply: Message) -> None:
    if not math.isfinite(metric(reply, "train-loss")):
        raise ProtectionError(f"its training diverged (loss {metric(reply, 'train-loss'):g})")


def _check_weights(reply: Message) -> None:
    arrays = reply.content.get(ARRAYS)  # removed where an update is protected
    if isinstance(arrays, ArrayRecord) and not all(_is_finite(value) for value in from_arrays(arrays).values()):
        raise ProtectionError("its weights are not finite: its training diverged")


def _below_quorum(quorum: int | None, answered: int) -> str:
    """Return that too few clients' updates can be used; empty where there are enough."""
    if quorum is None or answered >= quorum:
        return ""
    return f"the updates of {answered} clients can be used, fewer than federation.quorum = {quorum}"


def _reasons(failures: Sequence[str]) -> str:
    return "".join(f"\n  {reason}" for reason in failures[:3])


def _refuse_divergence(replies: list[Message]) -> None:
    """Raise TrainingError for the first client whose loss or weights are not finite."""
    for reply in replies:
        loss = metric(reply, "train-loss")
        arrays = from_arrays(cast(ArrayRecord, reply.content.get(ARRAYS, ArrayRecord()))).values()
        if not math.isfinite(loss) or not all(_is_finite(array) for array in arrays):
            raise TrainingError(
                f"training diverged: client {int(metric(reply, CLIENT))} (loss {loss:g})\n"
                "  try a smaller training.learning_rate, or training.max_grad_norm"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Say whether all numbers are finite.

    A sum of squares tells in a third of the time, unless it is itself too large.
    """
    flat = array.reshape(-1)
    return math.isfinite(float(np.dot(flat, flat))) or bool(np.isfinite(flat).all())
