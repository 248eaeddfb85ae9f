"""A user's own Flower strategy, `package.module:object` (a factory or a class), as the strategy of a run.

A factory is called with the experiment and the arguments that Flower's strategies share; a class that takes these
arguments by name is called with them alone. Flower's strategies draw from global generators, so these are seeded from a
named stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedveil.algorithms.algorithm import Arrays, Cohort, Contribution
from fedveil.core.errors import TrainingError
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream, global_random
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.flower import AppExitException
from fedveil.core.wire.messages import ARRAYS, CONFIG, METRICS, WEIGHT, from_arrays, to_arrays
from fedveil.server.rounds.rows import merged_scores


class FlowerStrategy:
    """A Flower strategy, whose attributes are its state between rounds."""

    reports: tuple[str, ...] = ()

    def __init__(self, name: str, strategy: Strategy) -> None:
        """Wrap a strategy; `name`: as in the settings."""
        self._name, self._strategy = name, strategy

    def train_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that the strategy configures for training."""
        with global_random(stream, "sampling"):
            return list(self._strategy.configure_train(number, model, ConfigRecord(dict(config)), grid))

    def aggregate(self, number: int, cohort: Cohort) -> Arrays | None:
        """Return the model that the strategy aggregates from the clients' replies.

        Raise TrainingError where it cannot.
        """
        replies = [_reply(one) for one in cohort.contributions]
        try:
            aggregate, _ = self._strategy.aggregate_train(number, replies)
        except AppExitException as error:
            raise TrainingError(f"{self._name} cannot aggregate: {error}") from error
        return None if aggregate is None else from_arrays(aggregate)

    def evaluate_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return the messages that the strategy configures for evaluation."""
        with global_random(stream, "evaluation sampling"):
            return list(self._strategy.configure_evaluate(number, model, ConfigRecord(dict(config)), grid))

    def scores(self, number: int, replies: list[Message]) -> Mapping[str, Any] | None:
        """Return the scores that the strategy aggregates from evaluations."""
        return self._strategy.aggregate_evaluate(number, replies)

    def kept(self) -> Mapping[str, Any]:
        """Return the strategy's attributes, without functions, which its construction sets."""
        return {name: value for name, value in vars(self._strategy).items() if not callable(value)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Set the strategy's attributes."""
        for name, value in kept.items():
            setattr(self._strategy, name, value)


def make_flower_strategy(
    found: Callable[..., Any], experiment: Experiment, evaluators: int, metrics: MetricSet
) -> Strategy:
    """Make a strategy with a user's own factory or class.

    evaluators: clients that a round asks to evaluate; metrics: of their evaluations
    """
    clients, cohort = experiment.data.clients, experiment.federation.cohort
    shared: dict[str, Any] = {
        # Flower takes max(int(fraction * clients), minimum): the minimum is exact, the fraction need not be
        "fraction_train": cohort / clients,
        "min_train_nodes": cohort,
        "fraction_evaluate": evaluators / clients,
        "min_evaluate_nodes": evaluators,
        "min_available_nodes": clients,
        "weighted_by_key": WEIGHT,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
        "train_metrics_aggr_fn": _mean_loss,
        "evaluate_metrics_aggr_fn": partial(_scores, metrics),
    }
    if isinstance(found, type) and issubclass(found, Strategy) and _takes(found, shared):
        return found(**shared)
    return cast(Strategy, found(experiment, shared))


def _takes(found: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError:
        return False
    return True


def _reply(one: Contribution) -> Message:
    """Return a contribution as the message that brought it."""
    sent = Message(RecordDict(), dst_node_id=one.client + 1, message_type=MessageType.TRAIN)
    content = RecordDict({ARRAYS: to_arrays(one.weights), METRICS: MetricRecord(dict(one.metrics))})
    return Message(content, reply_to=sent)


def _mean_loss(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the mean of the clients' training losses, weighted by their examples."""
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    weights = [float(cast(int, m[weighted_by_key])) for m in metrics]
    total = sum(w * float(cast(float, m["train-loss"])) for w, m in zip(weights, metrics, strict=True))
    return MetricRecord({"train-loss": total / sum(weights), "num-examples": int(sum(weights))})


def _scores(metrics: MetricSet, contents: list[RecordDict], _weighted_by_key: str) -> MetricRecord:
    return MetricRecord(dict(merged_scores(metrics, contents) or {}))
