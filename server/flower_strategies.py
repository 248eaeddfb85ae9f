"""A user's own Flower strategy as the strategy of a run (`own_strategies.py` makes it).

Flower's strategies draw their clients from global generators, so these are seeded from a named stream. What a strategy
keeps in its attributes is its state; attributes that no checkpoint can hold must stay as they were made.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedveil.algorithms.algorithm import Arrays, Cohort, Contribution
from fedveil.core.errors import FedveilError, TrainingError
from fedveil.core.metrics import MetricSet
from fedveil.core.places import where
from fedveil.core.randomness import Stream, global_random
from fedveil.core.wire.flower import AppExitException
from fedveil.core.wire.messages import ARRAYS, CONFIG, METRICS, from_arrays, to_arrays
from fedveil.server.checkpoint import can_store
from fedveil.server.rounds.rows import merged_scores
from fedveil.server.rounds.sampling import Chance


class FlowerStrategy:
    """A Flower strategy, whose attributes are its state between rounds."""

    reports: tuple[str, ...] = ()

    def __init__(self, name: str, strategy: Strategy, metrics: MetricSet | None = None) -> None:
        """Wrap a strategy; `name`: as in the settings; `metrics`: of evaluations, which every run tells."""
        self._name, self._strategy, self._metrics = name, strategy, metrics
        self._made = {key: _image(value) for key, value in _attributes(strategy) if not can_store(value)}
        self.told: Mapping[str, Any] = {}

    def train_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, chance: Chance
    ) -> list[Message]:
        """Return the messages that the strategy configures for training."""
        stream = chance.stream or Stream(secrets.randbits(63), number)
        with global_random(stream, "sampling"), self._doing("configure_train"):
            found = self._strategy.configure_train(number, model, ConfigRecord(dict(config)), grid)
        return self._checked("configure_train", found, grid)

    def aggregate(self, number: int, cohort: Cohort) -> Arrays | None:
        """Return the model that the strategy aggregates from the clients' replies.

        Raise TrainingError where it cannot.
        """
        replies = [_reply(one) for one in cohort.contributions]
        with self._doing("aggregate_train"):
            aggregate, metrics = self._strategy.aggregate_train(number, replies)
            self.told = dict(metrics or {})
            return None if aggregate is None else from_arrays(aggregate)

    def evaluate_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that the strategy configures for evaluation."""
        with global_random(stream, "evaluation sampling"), self._doing("configure_evaluate"):
            found = self._strategy.configure_evaluate(number, model, ConfigRecord(dict(config)), grid)
        return self._checked("configure_evaluate", found, grid)

    def scores(self, number: int, replies: list[Message]) -> Mapping[str, Any] | None:
        """Return the scores that every run tells, and beside them what the strategy aggregates from evaluations."""
        own = merged_scores(self._metrics, [reply.content for reply in replies]) if self._metrics else None
        with self._doing("aggregate_evaluate"):
            metrics = self._strategy.aggregate_evaluate(number, replies)
        return {**(metrics or {}), **(own or {})} or None

    def kept(self) -> Mapping[str, Any]:
        """Return the strategy's attributes, but for those that its construction alone sets."""
        return {
            key: value
            for key, value in _attributes(self._strategy)
            if self._made.get(key) is None or self._made[key] != _image(value)
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Set the strategy's attributes."""
        for key, value in kept.items():
            *inner, name = key.split(".")
            strategy = self._strategy
            for one in inner:
                strategy = getattr(strategy, one)
            held = getattr(strategy, name, None)
            if isinstance(held, dict) and type(held) is not dict:
                held.clear()
                held.update(value)
            else:
                setattr(strategy, name, value)

    def _checked(self, what: str, found: Any, grid: Grid) -> list[Message]:
        """Return the messages that the strategy made; raise TrainingError where FedVeil's clients could not read one."""
        nodes = grid.get_node_ids()
        for message in (messages := list(found)):
            if not isinstance(message, Message):
                wrong = f"holds a {type(message).__name__}, and must hold messages"
            elif message.metadata.dst_node_id not in nodes:
                wrong = f"addresses node {message.metadata.dst_node_id}, which grid.get_node_ids() does not have"
            elif lacking := {ARRAYS, CONFIG} - set(message.content):
                wrong = (
                    f"holds a message without '{min(lacking)}', under which FedVeil's clients look for what it is given"
                )
            else:
                continue
            raise TrainingError(f"{self._name}: what {what} returns {wrong}")
        return messages

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Raise TrainingError, with the line of code, for what the strategy's code raises within the block."""
        try:
            yield
        except FedveilError:
            raise
        except AppExitException as error:
            does = "cannot aggregate" if what.startswith("aggregate") else f"failed in {what}"
            raise TrainingError(f"{self._name} {does}: {error}") from error
        except Exception as error:  # a user's code may raise anything
            raise TrainingError(f"{self._name}.{what} failed: {type(error).__name__}: {error}{where(error)}") from error


def _attributes(strategy: Strategy, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a strategy's attributes, but for functions; of one within it with its name before."""
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            yield from _attributes(value, f"{before}{name}.")
        elif isinstance(value, dict):
            yield before + name, dict(value)  # a defaultdict's entries, too
        elif not callable(value):
            yield before + name, value


def _image(value: Any) -> bytes | None:
    """Return bytes that are the same as long as a value is; None where there are none."""
    try:
        once, again = pickle.dumps(value), pickle.dumps(value)
    except Exception:  # a user's object may raise anything
        return None
    return once if once == again else None


def _reply(one: Contribution) -> Message:
    """Return a contribution as the message that brought it."""
    sent = Message(RecordDict(), dst_node_id=one.client + 1, message_type=MessageType.TRAIN)
    content = RecordDict({ARRAYS: to_arrays(one.weights), METRICS: MetricRecord(dict(one.metrics))})
    return Message(content, reply_to=sent)
