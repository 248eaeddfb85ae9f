"""Contents of FedVeil's messages as Flower's records: arrays, the names of keys, and sizes on the wire.

Arrays, metrics and configuration travel under the keys that Flower's strategies expect. Outside client, server and
simulations, only this file and `core/wire/flower.py` import Flower.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading
from fedveil.core.wire.encodings import FLOAT16, FLOAT32, READERS, to_float16, to_int8
from fedveil.core.wire.flower import NUMPY, LazyArray, array_record
from fedveil.core.wire.framing import Piece, pack, unpack

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
WEIGHT = "num-examples"  # the key of a client's weight in an average
CLIENT = "client"  # the number of the client's partition, by which records name it
ROUND = "server-round"
MODEL_ROUND = "model-round"  # the round that made the model, where the one before made none
CLIP = "clip"  # the bound of updates in a round, where it changes from round to round
WITHIN = "within-clip"  # 1 where a client's update was no longer than that, else 0
SEALED = "sealed"  # the one array of a protected model or update
REFERENCE = "reference-examples"  # n_ref: the announced total of examples of a cohort
RUN = "run"  # 16 bytes that name the run
ATTEMPT = "attempt"  # the attempt at a round of secure aggregation
INBOX = "inbox"  # the part of a secure aggregation message that is for one client
BLOB, CONFIRMATIONS = "blob", "confirmations"  # bytes of the stages of secure aggregation
MANIFEST, SIGNATURES = "manifest", "signatures"  # what all clients of a run act on, and who signed it
SCHEMA, VERSION = "schema", "fedveil"  # in a client's first reply: the form of its data, and its FedVeil
REFUSED = "this client refuses; its own log says why"  # all that a server is told, whatever the reason
PARCEL, PIECE = "fedveil.parcel", 5_000_000  # bytes of one record; Flower cuts arrays into pieces of that size too


def to_arrays(parameters: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return parameters by name as an ArrayRecord, without copying or serialising them."""
    return array_record({name: LazyArray(value) for name, value in parameters.items()})


def from_arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the arrays of a record by name, in the record's order."""
    return {name: array.numpy() for name, array in record.items()}


def to_sealed(blob: bytes, protection: str) -> ArrayRecord:
    """Return a protected model or update as an ArrayRecord of bytes; its `stype` names the protection."""
    array = Array(dtype="uint8", shape=(len(blob),), stype=f"fedveil.{protection}", data=blob)
    return ArrayRecord({SEALED: array})


def from_sealed(record: ArrayRecord, protection: str) -> bytes | None:
    """Return the bytes of a protected model or update; None where the record holds none of this protection."""
    array = record.get(SEALED)
    return array.data if array is not None and array.stype == f"fedveil.{protection}" else None


def write_update(
    weights: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray], encoding: str, residual: np.ndarray | None
) -> tuple[ArrayRecord, np.ndarray | None]:
    """Encode a client's new weights for the wire, and return them with its next residual, which only int8 has.

    given: the model that the client was sent
    encoding: `communication.encoding`, which becomes the arrays' `stype`
    residual: float32 [P], of the client's last update; None before its first
    Raise ProtectionError where the encoding cannot hold the weights.
    """
    if encoding == FLOAT32:
        return to_arrays(weights), None
    lost = None
    if encoding == FLOAT16:
        written = to_float16(weights)
    else:
        written, lost = to_int8(weights, given, residual)
    arrays = {name: Array(encoding, weights[name].shape, f"fedveil.{encoding}", data) for name, data in written.items()}
    return ArrayRecord(arrays), lost


def read_update(record: ArrayRecord, given: Mapping[str, np.ndarray], encoding: str) -> dict[str, np.ndarray]:
    """Decode the weights in a client's reply, float32, by name in the order of `given`.

    given: the model that the client was sent
    Raise ProtectionError where the record does not hold such a model in this encoding.
    """
    differing = sorted(set(record) ^ set(given))
    if differing:
        name = differing[0]
        raise ProtectionError(
            f"its update is not of this model: {_short(name)} is {'missing' if name in given else 'none of its tensors'}"
        )
    return {name: _read_array(name, record[name], value, encoding) for name, value in given.items()}


def _read_array(name: str, array: Array, given: np.ndarray, encoding: str) -> np.ndarray:
    kind = NUMPY if encoding == FLOAT32 else f"fedveil.{encoding}"
    if (array.stype, array.dtype) != (kind, encoding):
        raise ProtectionError(
            f"its '{name}' is {_short(array.dtype)} written as {_short(array.stype)}, where communication.encoding = "
            f"'{encoding}' asks for '{encoding}' written as '{kind}'"
        )
    if tuple(array.shape) != given.shape:
        raise ProtectionError(
            f"its '{name}' has the shape {_short(tuple(array.shape))}, and the model's has {given.shape}"
        )
    if isinstance(array, LazyArray):
        return array.numpy()
    with reading(lambda why: ProtectionError(f"its '{name}' cannot be read: {why}")):
        return READERS[encoding](name, array.data, given)


def _short(value: object) -> str:
    """Return a value of another party on one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_parcel(content: RecordDict, piece: int = PIECE) -> RecordDict:
    """Pack a message into records of at most `piece` bytes: Flower makes separate calls for each array and record."""
    pieces: list[Piece] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            pieces.append(([name, ARRAYS], b""))
            pieces += [([name, ARRAYS, key, a.dtype, list(a.shape), a.stype], a.data) for key, a in record.items()]
        else:
            pieces.append(([name, METRICS if isinstance(record, MetricRecord) else CONFIG], record.deflate()))
    data = pack(pieces)
    cut = [data[start : start + piece] for start in range(0, len(data), piece)]
    return RecordDict({f"{PARCEL}.{i}": ConfigRecord({BLOB: part}) for i, part in enumerate(cut)})


def from_parcel(content: RecordDict) -> RecordDict:
    """Unpack a message that `to_parcel` packed; raise ProtectionError for any other content, forged ones included."""
    cut = []
    for i in range(len(content)):
        record = content.get(f"{PARCEL}.{i}")
        piece = record.get(BLOB) if isinstance(record, ConfigRecord) else None
        if not isinstance(piece, bytes):
            raise ProtectionError("its message is no parcel of FedVeil")
        cut.append(piece)
    found = RecordDict()
    for description, data in unpack(cut[0] if len(cut) == 1 else b"".join(cut)):
        _read_piece(found, description, data)
    return found


def _read_piece(found: RecordDict, description: Any, data: bytes) -> None:
    """Add to `found` the record, or the array of a record of arrays, that a piece describes."""
    with reading(lambda why: ProtectionError(f"its message's part {_short(description)} cannot be read: {why}")):
        name, kind, *array = description
        if kind != ARRAYS:
            kinds: dict[str, type[MetricRecord | ConfigRecord]] = {METRICS: MetricRecord, CONFIG: ConfigRecord}
            found[name] = kinds[kind].inflate(data)
        elif not array:
            found[name] = ArrayRecord()
        else:
            key, dtype, shape, stype = array
            if not all(isinstance(text, str) for text in (key, dtype, stype)):
                raise TypeError("an array without a name or a type")
            if not all(isinstance(side, int) and 0 <= side < 2**40 for side in shape):
                raise ValueError("an array without a shape")
            cast(ArrayRecord, found[name])[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes of the content as Flower serialises it, without its envelopes (about 1 %)."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(_array_bytes(array) for array in record.values())
        elif isinstance(record, MetricRecord | ConfigRecord):
            total += len(record.deflate())
    return total


def _array_bytes(array: Array) -> int:
    if isinstance(array, LazyArray):
        return _npy_bytes(array.dtype, array.shape)
    return len(array.data)


@lru_cache(maxsize=4096)
def _npy_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the length of the file that `np.save` would write."""
    kind = np.dtype(dtype)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    return len(header.getvalue()) + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
