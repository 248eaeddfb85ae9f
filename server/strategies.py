"""Strategies by name: Flower's own, set up from an experiment.

Each takes the experiment and the arguments that all of Flower's strategies share, and returns a strategy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedveil.core.catalog import STRATEGIES
from fedveil.core.declaration import part
from fedveil.core.experiment import Experiment
from fedveil.core.messages import ARRAYS, CONFIG, METRICS, ROUND, WEIGHT
from fedveil.models.evaluation import Scores, merge
from fedveil.server.aggregate import weighted_mean

Shared = dict[str, Any]
OF_THE_MEAN = "it computes with the mean of the weights"


def make(experiment: Experiment) -> Strategy:
    """The strategy an experiment names, which samples its cohort and weighs clients by their examples."""
    clients, cohort = experiment.data.clients, experiment.federation.cohort
    evaluators = (experiment.evaluation.cohort or cohort) if experiment.evaluation.federated else 0
    shared: Shared = {
        # Flower takes max(int(fraction * clients), minimum): the minimum is exact, the fraction need not be
        "fraction_train": cohort / clients,
        "min_train_nodes": cohort,
        "fraction_evaluate": evaluators / clients,
        "min_evaluate_nodes": evaluators,
        "min_available_nodes": clients,
        "weighted_by_key": WEIGHT,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
        "train_metrics_aggr_fn": mean_loss,
        "evaluate_metrics_aggr_fn": sum_scores,
    }
    factory = STRATEGIES.load(experiment.federation.strategy, "federation.strategy")
    return cast(Strategy, factory(experiment, shared))


def mean_loss(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The clients' training losses, averaged by their examples; none where clients do not tell them."""
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    weights = [float(cast(int, m[weighted_by_key])) for m in metrics]
    if not all("train-loss" in m for m in metrics):
        return MetricRecord({"num-examples": int(sum(weights))})
    total = sum(w * float(cast(float, m["train-loss"])) for w, m in zip(weights, metrics, strict=True))
    return MetricRecord({"train-loss": total / sum(weights), "num-examples": int(sum(weights))})


def sum_scores(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Accuracy, precision, recall and F1 over all clients' held-out examples, from the sums of their counts."""
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    scores = merge([
        Scores(
            examples=int(cast(int, m[weighted_by_key])),
            loss=float(cast(float, m["loss"])),
            correct=int(cast(int, m["correct"])),
            true_positives=int(cast(int, m["true-positives"])),
            false_positives=int(cast(int, m["false-positives"])),
            false_negatives=int(cast(int, m["false-negatives"])),
            auc=None,
        )
        for m in metrics
    ])  # fmt: skip
    named = scores.as_metrics(binary=True)
    return MetricRecord(dict(named))


class _FedAvg(flower.FedAvg):
    """Flower's FedAvg, to the same bytes, at a cost that depends on the cohort alone and is most of all arithmetic.

    Flower's lists the whole population twice a round: 50 ms and 40 MB for a million clients. The clients drawn are the same:
    `random.sample` asks a sequence for its length and the members it picks. Flower's mean checks and copies every
    reply. Beside one of Flower's strategies, all of which end in FedAvg, this takes FedAvg's place (`_on_ours`).
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return self._draw(self.min_train_nodes, server_round, arrays, config, grid, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return self._draw(self.min_evaluate_nodes, server_round, arrays, config, grid, MessageType.EVALUATE)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [reply.content for reply in replies if reply.has_content()]
        if not contents:
            return None, None
        return weighted_mean(contents, self.weighted_by_key), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _draw(
        self, number: int, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, kind: str
    ) -> list[Message]:
        there = cast(Sequence[int], grid.get_node_ids())  # on a network some may be missing
        nodes = random.sample(there, min(number, len(there)))
        config[ROUND] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return list(self._construct_messages(content, nodes, kind))


def _on_ours(strategy: type[flower.FedAvg]) -> Callable[..., Strategy]:
    """The class of a strategy of Flower's, with `_FedAvg` in place of FedAvg as the last of its bases."""
    return type(strategy.__name__, (strategy, _FedAvg), {})


@part(needs="sum")
def fedavg(_: Experiment, shared: Shared) -> Strategy:
    """FedAvg: the mean of the weights, each client's by its examples (McMahan et al. 2017, algorithm 1)."""
    return _FedAvg(**shared)


@part(needs="sum")
def fedprox(experiment: Experiment, shared: Shared) -> Strategy:
    """FedProx: FedAvg whose clients add mu/2 |w - w_global|^2 to their loss (Li et al. 2020, algorithm 2)."""
    return _on_ours(flower.FedProx)(**shared, proximal_mu=experiment.training.proximal_mu)


@part(needs="mean", why=OF_THE_MEAN)
def fedavgm(experiment: Experiment, shared: Shared) -> Strategy:
    """FedAvgM: SGD with momentum on the server (Hsu et al. 2019, section 4.3)."""
    settings = experiment.federation
    return _on_ours(flower.FedAvgM)(
        **shared,
        server_learning_rate=settings.server_learning_rate or 1.0,
        server_momentum=settings.server_momentum,
    )


def _adaptive(experiment: Experiment) -> Shared:
    settings = experiment.federation
    return {
        "eta": settings.server_learning_rate or 0.1,
        "eta_l": experiment.training.learning_rate,
        "tau": settings.tau,
    }


@part(needs="mean", why=OF_THE_MEAN)
def fedadam(experiment: Experiment, shared: Shared) -> Strategy:
    """FedAdam: Adam on the server (Reddi et al. 2021, algorithm 2; Flower corrects the moments' bias, which they do not)."""
    settings = experiment.federation
    return _on_ours(flower.FedAdam)(**shared, **_adaptive(experiment), beta_1=settings.beta_1, beta_2=settings.beta_2)


@part(needs="mean", why=OF_THE_MEAN)
def fedyogi(experiment: Experiment, shared: Shared) -> Strategy:
    """FedYogi: Yogi on the server (Reddi et al. 2021, algorithm 2)."""
    settings = experiment.federation
    return _on_ours(flower.FedYogi)(**shared, **_adaptive(experiment), beta_1=settings.beta_1, beta_2=settings.beta_2)


@part(needs="mean", why=OF_THE_MEAN)
def fedadagrad(experiment: Experiment, shared: Shared) -> Strategy:
    """FedAdagrad: Adagrad on the server (Reddi et al. 2021, algorithm 2)."""
    return _on_ours(flower.FedAdagrad)(**shared, **_adaptive(experiment))


class _GlobalLossQFedAvg(flower.QFedAvg, _FedAvg):
    """Flower's q-FedAvg, which asks clients for the loss it needs: F_k at the global weights, before training."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
        config["report-global-loss"] = True
        # L = 1 / learning rate (Li et al. 2020, section 3.3): the rate of this round
        self.client_learning_rate = float(config["learning-rate"])
        return super().configure_train(server_round, arrays, config, grid)


@part(needs="each", why="q-FedAvg weighs each update by its loss at the server")
def qfedavg(experiment: Experiment, shared: Shared) -> Strategy:
    """q-FedAvg: clients with a higher loss weigh more (Li et al. 2020, algorithm 2)."""
    return _GlobalLossQFedAvg(
        experiment.training.learning_rate, q=experiment.federation.q, train_loss_key="global-loss", **shared
    )


@part(needs="each", why="a median compares updates")
def fedmedian(_: Experiment, shared: Shared) -> Strategy:
    """The median of each weight (Yin et al. 2018, algorithm 1)."""
    return _on_ours(flower.FedMedian)(**shared)


@part(needs="each", why="a trimmed mean compares updates")
def fedtrimmedavg(experiment: Experiment, shared: Shared) -> Strategy:
    """The mean of each weight without its extremes (Yin et al. 2018, definition 2)."""
    return _on_ours(flower.FedTrimmedAvg)(**shared, beta=experiment.federation.trim_fraction)


@part(needs="each", why="Krum compares updates")
def krum(experiment: Experiment, shared: Shared) -> Strategy:
    """The one update closest to its neighbours (Blanchard et al. 2017, section 4)."""
    return _on_ours(flower.Krum)(**shared, num_malicious_nodes=experiment.federation.malicious)


@part(needs="each", why="Krum compares updates")
def multikrum(experiment: Experiment, shared: Shared) -> Strategy:
    """The mean of the updates closest to their neighbours (Blanchard et al. 2017, section 5)."""
    settings = experiment.federation
    selected = settings.selected or settings.cohort - settings.malicious - 2
    return _on_ours(flower.MultiKrum)(**shared, num_malicious_nodes=settings.malicious, num_nodes_to_select=selected)


@part(needs="each", why="Bulyan compares updates")
def bulyan(experiment: Experiment, shared: Shared) -> Strategy:
    """Krum's selection, then a trimmed mean of each weight (El Mhamdi et al. 2018, section 4)."""
    return _on_ours(flower.Bulyan)(**shared, num_malicious_nodes=experiment.federation.malicious)
