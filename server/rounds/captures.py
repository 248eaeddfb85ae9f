"""The server's view of each round, kept in the record where the settings ask for it, for attacks.

There is one file a round: the model as it was sent, each client's update as received (protected, if it is), the metrics
beside it, and the next model. It holds nothing that the server does not have anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from safetensors import safe_open
from safetensors.numpy import save

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import reading
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, METRICS, SEALED, WITHIN, from_sealed, read_update
from fedveil.server.checkpoint import State
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round

FOLDER = "captures"
Parameters = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Update:
    """A client's update as the server received it.

    weights: float32 by name; None where it is protected, and `sealed` holds its bytes
    metrics: the numbers beside it, and as `evaluate/...` those of the client's evaluation
    """

    weights: Parameters | None
    sealed: bytes | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Captured:
    """The capture of one round.

    before, after: the model that was sent, and the next one: float32 by name, or {SEALED: uint8 bytes}
    updates: by client; learning_rate: that clients were told to use
    clip: the bound of updates, where it changes from round to round
    """

    round: int
    before: Parameters
    after: Parameters
    updates: Mapping[int, Update]
    learning_rate: float
    clip: float | None = None

    @property
    def trained(self) -> Mapping[int, Update]:
        """The updates of clients that trained: others evaluated only."""
        return {
            client: update
            for client, update in self.updates.items()
            if update.weights is not None or update.sealed is not None
        }


class Capture(Observer):
    """Captures a round's messages, and writes them when the round is complete."""

    def __init__(self, experiment: Experiment, record: Record) -> None:
        self._experiment, self._record = experiment, record
        self._updates: dict[int, Update] = {}

    def begun(self, current: Round, state: State) -> None:
        """Drop the updates of an earlier round."""
        self._updates = {}

    def replied(self, current: Round, client: int, reply: Message) -> None:
        """Keep an update, protected or not; raise ProtectionError where it cannot be read."""
        record, privacy = reply.content.get(ARRAYS), self._experiment.privacy
        metrics = _numbers(reply)
        if not isinstance(record, ArrayRecord):
            return
        blob = from_sealed(record, privacy.protection.name)
        # copied: a simulation reuses the memory of a cohort's arrays for the next cohort
        weights = (
            {name: np.array(value) for name, value in self._read(record, current.model).items()}
            if blob is None and SEALED not in current.model
            else None
        )
        self._updates[client] = Update(weights, blob, metrics)

    def evaluated(self, current: Round, client: int, reply: Message) -> None:
        """Keep the metrics of a client's evaluation."""
        update = self._updates.get(client, Update(None, None, {}))
        told = {f"evaluate/{name}": value for name, value in _numbers(reply).items()}
        self._updates[client] = replace(update, metrics={**update.metrics, **told})

    def _read(self, record: ArrayRecord, given: Parameters) -> Parameters:
        return read_update(record, given, self._experiment.communication.encoding)

    def finished(self, current: Round, state: State) -> None:
        """Write the round, unless it was only evaluated, after a stop."""
        if not current.asked:
            return
        arrays: dict[str, np.ndarray] = {}
        for label, values in (("before", current.model), ("after", current.aggregate)):
            arrays |= {f"{label}/{name}": np.ascontiguousarray(value) for name, value in values.items()}
        updates = dict(sorted(self._updates.items()))  # not in order of arrival
        for client, update in updates.items():
            found = update.weights if update.sealed is None else {SEALED: np.frombuffer(update.sealed, np.uint8)}
            arrays |= {f"{client}/{name}": np.ascontiguousarray(value) for name, value in (found or {}).items()}
        about = {
            "round": current.number,
            "learning_rate": current.learning_rate,
            "clip": current.clip,
            "order": list(arrays),
            "metrics": {str(client): dict(update.metrics) for client, update in updates.items()},
        }
        folder = self._record.path(FOLDER)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._record.write(f"{FOLDER}/round-{current.number}.safetensors", save(arrays, {"fedveil": json.dumps(about)}))
        self._updates = {}


def _numbers(reply: Message) -> dict[str, float]:
    found = reply.content.get(METRICS)
    told = found if isinstance(found, MetricRecord) else MetricRecord()
    # the bit about a client's bound tells of its data what only the noisy count of all may tell
    return {name: float(value) for name, value in told.items() if isinstance(value, int | float) and name != WITHIN}


def read_captures(folder: Path) -> list[Captured]:
    """Return the captured rounds of the run in a folder, in order.

    Raise SettingsError where there are none, or unreadable ones.
    """
    files = sorted((folder / FOLDER).glob("round-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
    if not files:
        raise SettingsError(
            f"{folder}: the run has no captures, so there is nothing to attack; run it with --set federation.capture=true"
        )
    return [_read(path) for path in files]


def _read(path: Path) -> Captured:
    with reading(lambda why: SettingsError(f"{path}: is no capture of a round ({why}); take it away, or run again")):
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["fedveil"])
            parts: dict[str, dict[str, np.ndarray]] = {}
            for key in about["order"]:  # the file has another order than the network
                owner, _, name = key.partition("/")
                parts.setdefault(owner, {})[name] = file.get_tensor(key)
        updates = {}
        for client, metrics in about["metrics"].items():
            found = parts.get(client, {})
            sealed = found[SEALED].tobytes() if SEALED in found else None
            updates[int(client)] = Update((found or None) if sealed is None else None, sealed, metrics)
        return Captured(
            about["round"], parts["before"], parts["after"], updates, about["learning_rate"], about.get("clip")
        )
