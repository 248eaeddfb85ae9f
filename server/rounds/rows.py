"""What clients tell, as rows of clients.csv, one a client and stage, and of metrics.csv, one a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from flwr.app import Message, MetricRecord, RecordDict

from fedveil.core.experiment import Experiment
from fedveil.core.messages import CLIENT, METRICS, WEIGHT
from fedveil.models.evaluation import Scores, merge
from fedveil.privacy.accounting import observers
from fedveil.server.exchange import Exchanged, Row, count, metric

# "clipped" follows for protected updates
CLIENT_COLUMNS = (
    "round", "client", "stage", "examples", "steps", "train_loss", "validation_loss", "validation_accuracy",
)  # fmt: skip


def train_rows(replies: list[Message], number: int, *, protected: bool, tells: bool) -> list[Row]:
    """Rows of clients.csv about training; of protected updates also what protecting them cost, in seconds.

    tells: clients tell how many examples they have, and their losses
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


def evaluate_rows(replies: list[Message], number: int, *, protected: bool) -> list[Row]:
    """Rows of clients.csv about evaluation on what clients hold out."""
    return [
        dict.fromkeys(CLIENT_COLUMNS)
        | {
            "round": number,
            "client": int(metric(reply, CLIENT)),
            "stage": "evaluate",
            "examples": count(reply, WEIGHT),
            "validation_loss": metric(reply, "loss"),
            "validation_accuracy": metric(reply, "correct") / metric(reply, WEIGHT),
        }
        | ({"clipped": None} if protected else {})
        for reply in replies
    ]


def weighted_mean(clients: list[Row], key: str) -> float:
    """The mean of a column over clients, each as often as it has examples; NaN where none has any."""
    examples = sum(row["examples"] for row in clients)
    return sum(row["examples"] * row[key] for row in clients) / examples if examples else math.nan


def merged_scores(contents: Sequence[RecordDict]) -> Mapping[str, float] | None:
    """Return accuracy, precision, recall, F1 and loss over all clients' held-out examples, from the sums of their counts."""
    if not contents:
        return None
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    scores = merge([
        Scores(
            examples=int(cast(int, m[WEIGHT])),
            loss=float(cast(float, m["loss"])),
            correct=int(cast(int, m["correct"])),
            true_positives=int(cast(int, m["true-positives"])),
            false_positives=int(cast(int, m["false-positives"])),
            false_negatives=int(cast(int, m["false-negatives"])),
            auc=None,
        )
        for m in metrics
    ])  # fmt: skip
    return scores.as_metrics(binary=True)


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
        *observers(experiment),
    ]


def metrics_row(
    experiment: Experiment,
    binary: bool,
    number: int,
    test: Scores | None,
    validation: Mapping[str, Any] | None = None,
    loss: float | None = None,
    rate: float | None = None,
    trained: Exchanged | None = None,
) -> Row:
    """The row of a round, with every column that there is."""
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
