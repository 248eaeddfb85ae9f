"""A client that can be told to misbehave: `python actor.py client ...` is `fedveil client ...` with another trainer.

What it is told lies in files of the folder $ACTOR_SCRIPT: `round-3` holds the name of what it does to its update of round 3,
`round-0` of the next. There it leaves `held`, the round in which it holds, and `answered`, the last that it answered.
It is a registered client with the right keys and code, of which nothing but its updates is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from zlib import crc32

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedveil.client.node import join, trainer
from fedveil.client.node.trainer import ClientProfile, TrainerReply, TrainerRequest
from fedveil.core.wire.messages import ARRAYS, BLOB, CONFIG, METRICS, PARCEL, ROUND

HOLDING = 300.0  # seconds that a client may be held; a test that forgot it must end
LARGE = 24 << 20  # bytes of an update that is too large
HEADER = 272  # bytes of a ciphertext's, before its checksum
earlier: dict[int, RecordDict] = {}  # what was answered in each round


def script() -> Path:
    return Path(os.environ["ACTOR_SCRIPT"])


def leave(name: str, number: int) -> None:
    """Write a round where the test looks for it."""
    (script() / "leaving").write_text(str(number))
    (script() / "leaving").rename(script() / name)


def hold(number: int) -> None:
    """Say so, and wait for leave to go on."""
    leave("held", number)
    go, deadline = script() / "go", time.monotonic() + HOLDING
    while not go.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def with_arrays(change: Callable[[Array], Array]) -> Callable[[RecordDict, int], RecordDict]:
    """A deed that changes the first tensor of an update."""

    def deed(content: RecordDict, _number: int) -> RecordDict:
        record = content[ARRAYS]
        assert isinstance(record, ArrayRecord)
        first = next(iter(record))
        arrays = {name: change(array) if name == first else array for name, array in record.items()}
        return RecordDict({**content, ARRAYS: ArrayRecord(arrays)})

    return deed


def with_metric(key: str, value: float | int) -> Callable[[RecordDict, int], RecordDict]:
    """A deed that writes another number into a reply."""
    return lambda content, _number: RecordDict(
        {**content, METRICS: MetricRecord({**dict(content[METRICS]), key: value})}
    )  # type: ignore[dict-item]


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict, int], RecordDict]:
    """A deed that changes the numbers of the first tensor."""
    return with_arrays(lambda array: Array(change(array.numpy().copy())))


def bytes_of(change: Callable[[bytes], bytes], **others: str) -> Callable[[RecordDict, int], RecordDict]:
    """A deed that changes the bytes of the first tensor, or what they are said to be."""

    def written(array: Array) -> Array:
        form = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, **others}
        return Array(**form, data=change(array.data))  # type: ignore[arg-type]

    return with_arrays(written)


def replayed(_content: RecordDict, number: int) -> RecordDict:
    """The answer of the round before."""
    return earlier[number - 1]


def forged(offset: int, length: int) -> Callable[[RecordDict, int], RecordDict]:
    """A deed that changes a field of the header of a ciphertext, and makes its checksum right again."""

    def change(data: bytes) -> bytes:
        head, body = bytearray(data[:HEADER]), data[HEADER + 4 :]
        head[offset : offset + length] = bytes(byte ^ 1 for byte in head[offset : offset + length])
        return bytes(head) + struct.pack("<I", crc32(body, crc32(head))) + body

    return bytes_of(change)


def without(key: str) -> Callable[[RecordDict, int], RecordDict]:
    return lambda content, _number: RecordDict({name: record for name, record in content.items() if name != key})


DEEDS: dict[str, Callable[[RecordDict, int], RecordDict]] = {
    "not finite": numbers(lambda value: np.full_like(value, np.nan)),
    "infinite": numbers(lambda value: np.full_like(value, np.inf)),
    "other shape": numbers(lambda value: value[:-1]),
    "float64": numbers(lambda value: value.astype(np.float64)),
    "objects": bytes_of(lambda data: data.replace(b"'<f4'", b"'|O' ")),
    "truncated": bytes_of(lambda data: data[: len(data) // 2]),
    "empty": bytes_of(lambda _: b""),
    "other encoding": bytes_of(lambda data: data, stype="fedveil.ckks"),
    "large": bytes_of(lambda data: data + bytes(LARGE)),
    "no weights": without(ARRAYS),
    "no metrics": without(METRICS),
    "loss not finite": with_metric("train-loss", float("nan")),
    "no examples": with_metric("num-examples", 0),
    "another client": with_metric("client", 0),
    "replayed": replayed,
    # offsets: the table in privacy/homomorphic/wire.py
    "another key": forged(56, 16),
    "another run": forged(72, 16),
    "another round": forged(136, 1),
    "another's": forged(140, 1),
    "in the clear": lambda content, _number: RecordDict(
        {**content, ARRAYS: ArrayRecord({"dense1.weight": Array(np.zeros(4))})}
    ),
}


def cut_parcel(parcel: RecordDict) -> RecordDict:
    """A parcel without its last bytes."""
    name, record = list(parcel.items())[-1]
    assert isinstance(record, ConfigRecord)
    data = record[BLOB]
    assert isinstance(data, bytes)
    return RecordDict({**parcel, name: ConfigRecord({BLOB: data[:-5]})})


# What is done to a whole answer as it travels.
SPOILS: dict[str, Callable[[RecordDict], RecordDict]] = {
    "cut parcel": cut_parcel,
    "noise": lambda _parcel: RecordDict({f"{PARCEL}.0": ConfigRecord({BLOB: os.urandom(4096)})}),
    "no parcel": lambda _parcel: RecordDict({"content": ConfigRecord({"what": "words"})}),
}
spoil: list[str] = []  # how the answer at hand is spoiled


def told(number: int) -> str:
    """What it is to do in a round."""
    for name in (f"round-{number}", "round-0"):
        path = script() / name
        if path.exists():
            words = path.read_text()
            path.unlink()
            return words
    return ""


def act(
    request: TrainerRequest, profile: ClientProfile, honest: Callable[[TrainerRequest, ClientProfile], TrainerReply]
) -> TrainerReply:
    """Answer a message as told."""
    if request.message.metadata.message_type != "train":
        return honest(request, profile)
    number = int(request.message.content[CONFIG][ROUND])  # type: ignore[arg-type, call-overload, index]
    deed = told(number)
    if deed == "hold":
        hold(number)
    elif deed == "die":
        leave("held", number)
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stand still":
        leave("held", number)
        os.kill(os.getpid(), signal.SIGSTOP)
    outcome = honest(request, profile)
    if outcome.content is not None:
        earlier[number] = outcome.content
        if deed in DEEDS:
            outcome = replace(outcome, content=DEEDS[deed](outcome.content, number))
        spoil[:] = [deed] if deed in SPOILS else []
    leave("answered", number)
    return outcome


def command(descriptor: int, profile: ClientProfile) -> list[str]:
    """How to start this trainer in the place of the honest one."""
    return [sys.executable, __file__, "trainer", str(descriptor), json.dumps(asdict(profile))]


def main() -> None:
    if sys.argv[1] == "trainer":
        honest, pack = trainer.handle, trainer.to_parcel
        trainer.handle = lambda request, profile: act(request, profile, honest)
        trainer.to_parcel = lambda content: SPOILS[spoil.pop()](pack(content)) if spoil else pack(content)
        del sys.argv[1]
        trainer.main()
        return
    join.command = command
    from fedveil.cli import main as cli

    cli()


if __name__ == "__main__":
    main()
