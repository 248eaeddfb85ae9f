"""Protected runs that a test looks into: what clients made, each round's model, what travelled, and who meddled with it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from safetensors.numpy import load_file

from fedveil import Experiment, Result, run
from fedveil.client.learning.witness import Witness
from fedveil.core.errors import FedveilError
from fedveil.core.wire.messages import ARRAYS, ATTEMPT, CONFIG, METRICS, ROUND, SEALED, to_sealed
from fedveil.datasets.federated import load
from fedveil.privacy.fixed_point import Grid
from fedveil.privacy.plan import make_plan
from fedveil.simulations.display import Display
from fedveil.simulations.engine.cohort import CohortGrid
from helpers.experiments import digits

SMALL = {
    "data.clients": 5,
    "model.hidden": [8],
    "training.epochs": 1,
    "training.batch_size": 64,
    "federation.cohort": 5,
    "federation.rounds": 2,
    "engine": "sequential",
}
HELD_OUT = {"data__validation_fraction": 0.2, "evaluation__federated": True}
Weights = Mapping[str, np.ndarray]
Made = dict[int, tuple[Weights, int]]  # by client: its weights, and the number of its examples


def small(protection: str, **settings: Any) -> Experiment:
    """The digits over 5 clients that all take part in 2 rounds."""
    return digits(SMALL | {"privacy.protection": protection}, **settings)


@dataclass(frozen=True)
class Sent:
    """A message on its way: its stage (train, evaluate, advertise, share, confirm, reveal), and the number of its client."""

    stage: str
    round: int
    client: int
    attempt: int


Watched = Callable[..., "Observed"]  # the fixture: a run, in a folder of the test's
# is shown each message and gives what arrives in its place: of a message to a client one, of a reply none or several
Outward = Callable[[Sent, Message], Message]
Homeward = Callable[[Sent, Message], Sequence[Message]]


def untouched(_: Sent, message: Message) -> Message:
    """An honest server and network."""
    return message


@dataclass
class Observed(Display):
    """What a run showed; `error`: what it ended with, `models`: after each round, in the clear."""

    folder: Path
    out: Outward = untouched
    home: Homeward = lambda _sent, reply: [reply]
    result: Result | None = None
    error: FedveilError | None = None
    made: list[Made] = field(default_factory=lambda: [{}])
    models: list[Weights] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    uploads: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(None)

    def round_done(self, row: dict[str, Any], state: Any) -> None:
        """Keep the round's model."""
        if row["round"] > 0:
            self.models.append(load_file(self.folder / "model.safetensors"))
            self.made.append({})

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.warnings.append(text)

    @property
    def failures(self) -> list[str]:
        """The reasons in ledger.csv, each with its round, stage and client."""
        ledger = self.table("ledger").dropna(subset="failure")
        return [f"{row.round} {row.stage} {row.client}: {row.failure}" for row in ledger.itertuples()]

    def table(self, name: str) -> pd.DataFrame:
        """A table of the record."""
        return pd.read_csv(self.folder / f"{name}.csv")


def observe(
    monkeypatch: pytest.MonkeyPatch,
    experiment: Experiment,
    folder: Path,
    home: Homeward | None = None,
    out: Outward | None = None,
) -> Observed:
    """Run an experiment in `folder`, or go on with the run there; every message passes `out` and every reply `home`."""
    seen = Observed(folder)
    seen.out, seen.home = out or seen.out, home or seen.home
    saw = Witness.saw

    def remember(self: Witness, client: int, weights: Weights, examples: int) -> None:
        seen.made[-1][client] = {name: value.copy() for name, value in weights.items()}, examples
        saw(self, client, weights, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "saw", remember)
        patch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])
        patch.setattr("fedveil.core.record.environment._commit", lambda: None)
        patch.setattr("fedveil.simulations.run.CohortGrid", _meddling(CohortGrid, seen))
        where = {"resume": folder} if folder.exists() else {"out": folder}
        try:
            seen.result = run(experiment, display=seen, **where)
        except FedveilError as error:
            seen.error = error
    return seen


def _meddling(kind: type[CohortGrid], seen: Observed) -> type[CohortGrid]:
    """A grid on which messages travel as Flower's bytes, and anybody may have his hands on them."""

    class Meddling(kind):  # type: ignore[misc, valid-type]
        def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
            sent = [_sent(message) for message in messages]
            changed = [seen.out(about, message) for about, message in zip(sent, messages, strict=True)]
            for i, reply in super().answers(changed, timeout):
                arrived = travelled(reply)
                if sent[i].stage == "train" and arrived.has_content() and SEALED in arrived.content[ARRAYS]:
                    seen.uploads.append(blob_of(arrived))
                for message in seen.home(sent[i], arrived):
                    yield i, message

        def _run_client(self, message: Message) -> Message:
            return super()._run_client(travelled(message))  # type: ignore[no-any-return]

    return Meddling


def _sent(message: Message) -> Sent:
    stage = message.metadata.message_type.rpartition(".")[2]
    config = message.content[CONFIG]
    return Sent(stage, int(config[ROUND]), message.metadata.dst_node_id - 1, int(config.get(ATTEMPT, 0)))


def travelled(message: Message) -> Message:
    """A message after its way over a network: Flower's protobuf, as bytes, read again."""
    proto = message_to_proto(message)
    return message_from_proto(type(proto).FromString(proto.SerializeToString()))


def blob_of(message: Message) -> bytes:
    """The protected update or model in a message."""
    return message.content[ARRAYS][SEALED].data


def with_blob(message: Message, blob: bytes, protection: str) -> Message:
    """A message with another protected update or model in it."""
    message.content[ARRAYS] = to_sealed(blob, protection)
    return message


def with_metric(message: Message, **metrics: Any) -> Message:
    """A message with other metrics in it; `_` stands for `-` in their names."""
    for name, value in metrics.items():
        message.content[METRICS][name.replace("_", "-")] = value
    return message


def forged(blob: bytes, offset: int, kind: str, value: Any) -> bytes:
    """An encrypted message with another field in its header (`privacy/homomorphic/wire.py`), and the checksum to match."""
    changed = bytearray(blob)
    struct.pack_into(f"<{kind}", changed, offset, value)
    return resealed(bytes(changed))


def resealed(blob: bytes) -> bytes:
    """An encrypted message with the checksum that its content has."""
    return blob[:272] + struct.pack("<I", crc32(blob[276:], crc32(blob[:272]))) + blob[276:]


def by_hand(made: Made, clients: Iterable[int], grid: Grid, announced: int) -> Weights:
    """The model that a protected round of these clients must make, in Python's whole numbers, one weight at a time.

    announced: the examples of the whole cohort
    """
    taken = [made[client] for client in clients]
    step, present = 2.0**-grid.bits, sum(examples for _, examples in taken)
    model = {}
    for name, like in taken[0][0].items():
        total = [0] * like.size
        for weights, examples in taken:
            factor = examples / announced / step
            for i, weight in enumerate(weights[name].reshape(-1).tolist()):
                total[i] += round(max(-grid.limit, min(grid.limit, weight)) * factor)
        mean = [number * (step / (present / announced)) for number in total]
        model[name] = np.array(mean, np.float32).reshape(like.shape)
    return model


def assert_same(model: Weights, wanted: Weights) -> None:
    """Fail unless the weights are the same to the bit."""
    assert sorted(model) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(model[name], wanted[name], err_msg=name)


def ended(seen: Observed) -> Observed:
    """The run, which must have come to its end."""
    if seen.error is not None:
        raise seen.error
    return seen


def assert_sums(seen: Observed, experiment: Experiment, number: int, clients: Iterable[int]) -> None:
    """Fail unless a round's model is the exact sum of what these clients made."""
    grid = make_plan(experiment.privacy, experiment.federation.cohort).grid
    announced = load(experiment.data, experiment.seed).sizes(np.arange(experiment.data.clients)).sum()
    assert_same(seen.models[number - 1], by_hand(seen.made[number - 1], clients, grid, int(announced)))


def assert_goes_on(seen: Observed, experiment: Experiment, watched: Watched, whole: Observed) -> None:
    """Fail unless the run ends, once everybody is honest, as one that always was."""
    kept = seen.table("metrics")
    resumed = ended(watched(experiment))
    assert resumed.table("metrics").equals(whole.table("metrics"))
    assert kept.equals(whole.table("metrics").loc[: len(kept) - 1])
    for name in ("model.safetensors", "best.safetensors", "clients.csv"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def kill() -> None:
    """End this process as the system would: nothing more is written, nothing is cleaned up."""
    os.kill(os.getpid(), 9)
