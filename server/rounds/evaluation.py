"""The evaluation of a round's model on the clients' held-out data."""

from __future__ import annotations

from flwr.app import Message

from fedveil.server.exchange import exchange
from fedveil.server.rounds.context import Context, to_record
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.rows import evaluate_rows


def evaluate_on_clients(context: Context, current: Round) -> None:
    """Ask clients to evaluate the round's new model; keep their scores, their rows and their messages' account."""
    experiment, strategy, metrics = context.experiment, context.strategy, context.metrics
    model = to_record(current.aggregate, experiment.privacy.protection.name)
    messages = strategy.evaluate_messages(current.number, model, context.config(current), context.grid, current.stream)

    def see(client: int, reply: Message) -> None:
        for observer in context.observers:
            observer.evaluated(current, client, reply)

    account, replies = exchange(
        context.grid, messages, current.number, "evaluate", context.timeout, see, metrics.numbers, metrics.whole
    )
    account.clients = evaluate_rows(replies, current.number, metrics, protected=context.protection is not None)
    current.evaluated, current.validation = account, strategy.scores(current.number, replies)
    for reason in account.failures:
        context.hooks.warn(f"round {current.number}: {reason}")
