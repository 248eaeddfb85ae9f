"""The summary of a run in numbers, as `fedveil run --json` prints it, with the costs and effect of its protection."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, to_arrays, wire_bytes
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.dp.accounting.guarantee import describe, epsilons, explain
from fedveil.privacy.plan import plan_for
from fedveil.server.checkpoint import MODEL, State
from fedveil.server.exchange import Row
from fedveil.server.federation import Federation
from fedveil.server.rounds.accounting import shown

FILE = "protection.json"
READERS = {
    "none": "the server sees every client's weights",
    "ckks": "the server saw no trained weights, only ciphertexts; whoever holds client.key, as every client does, reads all",
    "bfv": "the server saw no trained weights, only ciphertexts; whoever holds client.key, as every client does, reads all",
    "secagg": "the server saw the mean of each cohort's weights and no client's own; the clients see the model it made of that",
}


def summary(federation: Federation, record: Record, *, secret: bool = False) -> dict[str, Any]:
    """Return what `fedveil run --json` prints: the last row of the metrics, and values that scripts may rely on.

    secret: noise came from the operating system's generator, and not from the seed
    """
    import pandas as pd

    metrics = pd.read_csv(record.path("metrics.csv"))
    state, last = federation.state, metrics.iloc[-1]
    scores = {
        name: None if math.isnan(last[name]) else float(last[name])
        for name in metrics.columns
        if name.startswith(("test_", "validation_"))
    }
    return {
        "run_dir": str(record.folder),
        "rounds": state.round,
        **scores,
        "best_round": state.best_round,
        "stopped": state.stopped or None,
        "seconds": round(state.seconds, 3),
        "model_sha256": record.sha256(MODEL) if record.path(MODEL).exists() else None,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "engine": federation.experiment.engine,
        "device": federation.device.type,
        "protection": federation.experiment.privacy.protection.name,
        **({"privacy": costs(federation, record)} if federation.protection else {}),
        **guarantee(federation, secret=secret),
        "doubt": doubt(federation, scores.get("test_accuracy")),
    }


def doubt(federation: Federation, accuracy: float | None) -> str | None:
    """Return why the test accuracy shows no learning, with likely causes; None where it is better than guessing.

    Guessing is to name the most frequent label every time. A share of n predictions has a standard deviation of
    sqrt(p (1 - p) / n) by chance; what lies less than two above guessing counts as no better.
    """
    test, experiment = federation.federated.dataset.test, federation.experiment
    labels = test.labels if test.mask is None else test.labels[test.mask]
    if accuracy is None or not labels.size:
        return None
    guess = guessing(labels)
    if accuracy > guess + 2 * math.sqrt(guess * (1 - guess) / labels.size):
        return None
    settings, privacy = experiment.training, experiment.privacy
    causes = [*federation.federated.dataset.notes]
    if privacy.noisy:
        causes.append(f"noise drowns so few updates (noise multiplier {privacy.multiplier:g})")
    causes.append(f"the learning rate (training.learning_rate = {settings.learning_rate:g}) is too large or too small")
    causes.append(f"{federation.state.round:,} round(s) are too few")
    return (
        f"test accuracy {accuracy:.4f} is no better than guessing the most frequent label, {guess:.4f} of {labels.size:,}; "
        f"likely causes: {'; '.join(causes)}; or labels that do not follow from the data"
    )


def guessing(labels: np.ndarray) -> float:
    """Return the accuracy of naming the most frequent label every time."""
    return float(np.unique(labels, return_counts=True)[1].max() / labels.size)


def scores_line(row: Row, state: State) -> str:
    """Describe the scores of a round and the bytes moved so far."""
    words = []
    if row.get("train_loss") is not None:
        words.append(f"loss {row['train_loss']:.4f}")
    for name, label in (
        ("test_accuracy", "test accuracy"),
        ("test_f1", "F1"),
        ("validation_accuracy", "validation accuracy"),
        ("validation_f1", "validation F1"),
    ):
        if row.get(name) is not None:
            words.append(f"{label} {row[name]:.4f}")
    words += [f"{name.replace('_', ' ')} {row[name]:.3g}" for name in row if name.startswith("epsilon") and row[name]]
    if row.get("failures"):
        words.append(f"{row['failures']} of {row['clients'] + row['failures']} clients failed")
    words.append(f"{megabytes(state.bytes_up + state.bytes_down)} moved")
    return "  ".join(words)


def megabytes(count: int) -> str:
    """Write a number of bytes as MB (10^6 bytes)."""
    return f"{count / 1e6:,.1f} MB"


def guarantee(federation: Federation, *, secret: bool) -> dict[str, Any]:
    """Return the guarantee of clipping and noise after the last round, for a summary; nothing where no noise is added.

    epsilon, and epsilon_sum or epsilon_update: against the observers that epsilon_against names; null where infinite
    the rest, and `secret`: as in `describe`
    """
    experiment = federation.experiment
    found = epsilons(experiment, shown(federation.state))
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {**finite, **describe(experiment, secret=secret)}


def guarantee_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the guarantees of a summary in words, one for each observer; none where no noise was added."""
    lines = [
        explain(math.inf if found[name] is None else found[name], found["delta"], against, found["epsilon_unit"])
        for name, against in found.get("epsilon_against", {}).items()
    ]
    return [*lines, f"the noise came {found['noise']}", found["not_covered"]] if lines else []


def costs(federation: Federation, record: Record) -> dict[str, Any]:
    """Return the costs of a run's protection, by name, for its summary.

    bytes_up_ratio, bytes_down_ratio: to the same messages in the clear
    seal_seconds, open_seconds: of all clients, processor time; clipped: numbers; None of them under noise, which covers
    neither
    largest_error: of a round's model from the plain mean; None where the plain mean is not known (Ray)
    error_bound: the largest error from rounding to the grid and to float32, where nothing was clipped
    """
    import pandas as pd

    assert federation.protection is not None
    state, plan, told = federation.state, federation.protection.plan, not federation.experiment.privacy.noisy
    ledger = pd.read_csv(record.path("ledger.csv"), usecols=["stage", "bytes_up"])
    plain = wire_bytes(RecordDict({ARRAYS: to_arrays(to_numpy(get(federation.network)))}))
    stages = ledger[ledger.stage.isin(["train", "evaluate"])]
    up = plain * int(stages[stages.stage == "train"].bytes_up.notna().sum())
    down = plain * len(stages)
    return {
        "parameters": plan.explain(),
        "bytes_up_ratio": round(state.bytes_up / up, 3) if up else None,  # where every round was left out
        "bytes_down_ratio": round(state.bytes_down / down, 3) if down else None,
        "seal_seconds": round(state.costs.get("seal_seconds", 0.0), 3) if told else None,
        "open_seconds": round(state.costs.get("open_seconds", 0.0), 3) if told else None,
        "clipped": int(state.costs.get("clipped", 0)) if told else None,
        "largest_error": state.costs.get("largest_error"),
        "error_bound": state.costs.get("error_bound"),
        "readers": READERS[federation.experiment.privacy.protection.name],
    }


def describe_protection(experiment: Experiment, record: Record, scores: str, key: str | None) -> None:
    """Write a run's protection, and who can read what, into its record.

    scores: who evaluates; key: the fingerprint of the clients' key
    """
    protection = experiment.privacy.protection.name
    description: dict[str, Any] = {
        "protection": protection,
        "parameters": plan_for(experiment).explain(),
        "readers": READERS[protection],
        "test scores": scores,
    }
    if key is not None:
        description["key"] = key
    record.write(FILE, json.dumps(description, indent=2).encode() + b"\n")
