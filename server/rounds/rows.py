"""Rows of clients.csv, one a client and stage, and of metrics.csv, one a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from flwr.app import Message, MetricRecord, RecordDict

from fedveil.core.metrics import MetricSet, Scores, merge
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import CLIENT, METRICS, WEIGHT
from fedveil.privacy.dp.accounting.guarantee import observers
from fedveil.server.exchange import Exchanged, Row, count, metric

# "clipped" follows for protected updates
CLIENT_COLUMNS = (
    "round", "client", "stage", "examples", "steps", "train_loss", "validation_loss", "validation_accuracy",
)  # fmt: skip


def train_rows(replies: list[Message], number: int, *, protected: bool, tells: bool) -> list[Row]:
    """Return rows of clients.csv about training.

    Of protected updates they also hold the seconds that protection took, and the clipped numbers.
    tells: clients report how many examples they have, and their losses
    """
    return [
        dict.fromkeys(CLIENT_COLUMNS)
        | {
            "round": number,
            "client": int(metric(reply, CLIENT)),
            "stage": "train",
            "examples": count(reply, WEIGHT) if tells else None,
            "steps": count(reply, "steps") if tells else None,
            "train_loss": metric(reply, "train-loss") if tells else None,
        }
        | ({key: metric(reply, key.replace("_", "-")) for key in ("seal_seconds", "open_seconds")} if protected else {})
        | ({"clipped": count(reply, "clipped")} if protected else {})
        for reply in replies
    ]


def evaluate_rows(replies: list[Message], number: int, metrics: MetricSet, *, protected: bool) -> list[Row]:
    """Return rows of clients.csv about evaluation on the clients' held-out data."""
    found = [metrics.read(cast(MetricRecord, reply.content[METRICS])) for reply in replies]
    return [
        dict.fromkeys(CLIENT_COLUMNS)
        | {
            "round": number,
            "client": int(metric(reply, CLIENT)),
            "stage": "evaluate",
            "examples": scores.examples,
            "validation_loss": scores.loss,
            "validation_accuracy": scores.accuracy,
        }
        | ({"clipped": None} if protected else {})
        for reply, scores in zip(replies, found, strict=True)
    ]


def weighted_mean(clients: list[Row], key: str) -> float:
    """Return the mean of a column over clients, weighted by their examples; NaN where there are none."""
    examples = sum(row["examples"] for row in clients)
    return sum(row["examples"] * row[key] for row in clients) / examples if examples else math.nan


def merged_scores(metrics: MetricSet, contents: Sequence[RecordDict]) -> Mapping[str, float] | None:
    """Return the metrics over all held-out data, from the sums that clients report; None where there are no replies."""
    if not contents:
        return None
    return metrics.values(merge([metrics.read(cast(MetricRecord, content[METRICS])) for content in contents]))


def columns(experiment: Experiment, metrics: MetricSet) -> list[str]:
    """Return the columns of metrics.csv, which depend on the settings alone."""
    return [
        "round",
        "learning_rate",
        "clients",
        "failures",
        "train_loss",
        *(f"test_{name}" for name in metrics.names),
        *(f"validation_{name}" for name in metrics.merged if experiment.evaluation.federated),
        *(["clip"] if experiment.privacy.clip == "adaptive" else []),
        *observers(experiment),
    ]


def metrics_row(
    experiment: Experiment,
    metrics: MetricSet,
    number: int,
    test: Scores | None,
    validation: Mapping[str, Any] | None = None,
    loss: float | None = None,
    rate: float | None = None,
    trained: Exchanged | None = None,
    told: Mapping[str, Any] | None = None,
    clip: float | None = None,
) -> Row:
    """Return the row of a round, with every column, and after them metrics of a strategy's own.

    told: those of its aggregation; those of evaluation are in `validation`
    clip: the bound of the next round's updates, where it changes from round to round
    """
    values: Row = {
        "round": number,
        "learning_rate": rate,
        "clients": len(trained.answered) if trained else None,
        "failures": len(trained.failures) if trained else None,
        "train_loss": loss,
        "clip": clip,
        **{f"test_{name}": value for name, value in (metrics.values(test) if test else {}).items()},
        **{f"validation_{name}": value for name, value in (validation or {}).items()},
    }
    known = columns(experiment, metrics)
    own = {_column("train", name): value for name, value in (told or {}).items()}
    own |= {_column("validation", name): value for name, value in (validation or {}).items()}
    return {name: values.get(name) for name in known} | {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in own.items()
        if name not in known
    }


def _column(stage: str, name: str) -> str:
    """Return the column of a strategy's own metric: `train_spread` for `spread` of training."""
    name = name.replace("-", "_")
    return name if name.startswith(f"{stage}_") else f"{stage}_{name}"
