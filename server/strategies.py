"""The strategy that an experiment names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort, State
from fedveil.core.declaration import declares
from fedveil.core.errors import SettingsError
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, CONFIG, ROUND
from fedveil.server.checkpoint import check_storable
from fedveil.server.flower_strategies import FlowerStrategy
from fedveil.server.own_strategies import make_flower_strategy
from fedveil.server.rounds.rows import merged_scores
from fedveil.server.rounds.sampling import Chance, Sampling, draw
from fedveil.server.rounds.strategy import Strategy


class AlgorithmStrategy:
    """An algorithm with drawn cohorts."""

    def __init__(self, algorithm: Algorithm, sampling: Sampling, evaluators: int, metrics: MetricSet) -> None:
        """Combine an algorithm with the drawing of clients.

        sampling: of those that train; evaluators: clients that a round asks to evaluate; metrics: of evaluations
        """
        self.reports = algorithm.reports
        self._algorithm, self._sampling, self._evaluators, self._metrics = algorithm, sampling, evaluators, metrics
        self._state: State | None = None
        self.told: Mapping[str, Any] = {}

    def train_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, chance: Chance
    ) -> list[Message]:
        """Return messages to a drawn cohort, with the algorithm's settings."""
        nodes = self._sampling.draw(cast(Sequence[int], grid.get_node_ids()), number, chance)
        return _messages(nodes, MessageType.TRAIN, number, model, {**config, **self._algorithm.config})

    def aggregate(self, number: int, cohort: Cohort) -> Arrays:
        """Apply the rule, then the server optimiser."""
        state = self._algorithm.init(cohort.model) if self._state is None else self._state
        self._state, model = self._algorithm.apply(state, cohort.model, self._algorithm.rule(cohort))
        return model

    def evaluate_messages(
        self, number: int, model: ArrayRecord, config: Mapping[str, Any], grid: Grid, stream: Stream
    ) -> list[Message]:
        """Return messages to clients drawn for evaluation."""
        nodes = draw(cast(Sequence[int], grid.get_node_ids()), self._evaluators, stream, "evaluation sampling")
        return _messages(nodes, MessageType.EVALUATE, number, model, config)

    def scores(self, number: int, replies: list[Message]) -> Mapping[str, float] | None:
        """Merge the clients' scores."""
        return merged_scores(self._metrics, [reply.content for reply in replies])

    def kept(self) -> Mapping[str, Any]:
        """Return the server optimiser's state."""
        return self._state or {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Restore a state; start with a new one where none was kept."""
        self._state = kept or None


def make(experiment: Experiment, metrics: MetricSet) -> Strategy:
    """Return the strategy that an experiment names: an algorithm, or a user's own Flower strategy.

    metrics: of evaluations
    Raise SettingsError where it cannot be made, or keeps what no checkpoint can hold.
    """
    federation, clients = experiment.federation, experiment.data.clients
    chosen, cohort = federation.strategy, federation.cohort
    found = chosen.load()
    evaluators = (experiment.evaluation.cohort or cohort) if experiment.evaluation.federated else 0
    if declares(found):
        sampling = Sampling(federation.sampling, clients, cohort)
        return AlgorithmStrategy(found(chosen.settings, experiment), sampling, evaluators, metrics)
    if federation.sampling != "fixed":
        raise SettingsError(
            f"federation.sampling = '{federation.sampling}': federation.strategy = '{chosen.name}' is one of Flower's, which draws "
            "its clients itself; use federation.sampling = 'fixed', or a strategy of `fedveil list strategies`"
        )
    strategy = FlowerStrategy(
        chosen.name, make_flower_strategy(found, chosen.name, experiment, evaluators, metrics), metrics
    )
    check_storable(strategy, chosen.name)
    return strategy


def _messages(
    nodes: Sequence[int], kind: str, number: int, model: ArrayRecord, config: Mapping[str, Any]
) -> list[Message]:
    """Return messages with one shared content to all nodes: engines compute messages that share it together."""
    content = RecordDict({ARRAYS: model, CONFIG: ConfigRecord({**config, ROUND: number})})
    return [Message(content, dst_node_id=node, message_type=kind) for node in nodes]
