"""Messages as parcels: what comes out is what went in, and a stranger's bytes are refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.core.wire import messages
from fedveil.core.wire.framing import LARGEST_HEADER, pack, unpack
from fedveil.core.wire.messages import BLOB, from_arrays, from_parcel, to_arrays, to_parcel

NAMES = st.text(max_size=8)
DESCRIPTIONS = st.none() | st.integers() | st.lists(NAMES, max_size=3)
PIECES = st.lists(st.tuples(DESCRIPTIONS, st.binary(max_size=40)), max_size=12)


def message() -> RecordDict:
    """What a message may hold, of every kind."""
    rng = np.random.default_rng(0)
    arrays = to_arrays({"a.weight": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros((0, 2), np.float32)})
    arrays["sealed"] = Array(dtype="uint8", shape=(5,), stype="fedveil.ckks", data=b"12345")
    return RecordDict({
        "arrays": arrays,
        "metrics": MetricRecord({"loss": 0.1, "client": 3, "many": [1, 2], "none": []}),
        "config": ConfigRecord({"run": b"\x00\xff", "words": ["a", "b"], "on": True, "x": 1.5, "text": "é"}),
        "empty": ConfigRecord({}),
    })  # fmt: skip


def same(one: RecordDict, other: RecordDict) -> None:
    assert list(one) == list(other)
    for name, record in one.items():
        found = other[name]
        if isinstance(record, ArrayRecord):
            assert [(k, a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()] == [
                (k, a.dtype, tuple(a.shape), a.stype, a.data) for k, a in found.items()
            ]
        else:
            assert type(record) is type(found)
            assert dict(record) == dict(found)


@given(PIECES)
def test_pieces_come_out_as_they_went_in(pieces) -> None:
    assert unpack(pack(pieces)) == pieces


@pytest.mark.parametrize("piece", [7, 100, 5_000_000])
def test_a_message_is_the_same_after_its_way_in_one_record_or_many(piece) -> None:
    parcel = to_parcel(message(), piece)
    sizes = [len(record[BLOB]) for record in parcel.values()]
    assert max(sizes) <= piece
    assert (len(sizes) == 1) == (piece == 5_000_000)
    same(message(), from_parcel(parcel))
    weights = from_arrays(from_parcel(to_parcel(RecordDict({"arrays": to_arrays({"w": np.eye(3)})}), piece))["arrays"])
    assert np.array_equal(weights["w"], np.eye(3))


def test_a_parcel_weighs_little_more_than_what_is_in_it() -> None:
    content = RecordDict({"arrays": to_arrays({f"layer{i}": np.zeros((64, 64), np.float32) for i in range(8)})})
    parcel = sum(len(record[BLOB]) for record in to_parcel(content).values())
    assert parcel < 1.01 * messages.wire_bytes(content)


def frame(header: bytes | dict, body: bytes = b"") -> bytes:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + body


def tensor(start: int, end: int) -> dict:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


def listed(descriptions: str) -> dict:
    return {"__metadata__": {"pieces": descriptions}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no parcel"),
        (b"FVP1" + bytes(8), "header of 827,348,550 bytes"),
        (struct.pack("<Q", LARGEST_HEADER + 1), "header of 1,048,577 bytes"),
        (struct.pack("<Q", 9) + b"{}", "no parcel"),
        (frame(b"[[1"), "no parcel"),
        (frame(b"3"), "no parcel"),
        (frame(b"[" * 100_000), "no parcel"),
        (frame({}), "does not describe"),
        (frame({"0": tensor(0, 4)}, b"1234"), "does not describe"),
        (frame(listed("[[1")), "does not describe"),
        (frame(listed("3")), "does not describe"),
        (frame(listed("[" * 100_000)), "does not describe"),
        (frame({"__metadata__": {"pieces": 3}}), "no parcel"),
        (frame(listed("[null]")), "does not describe"),
        (frame({**listed("[null]"), "1": tensor(0, 4)}, b"1234"), "does not describe"),
        (frame({**listed("[]"), "0": tensor(0, 4)}, b"1234"), "1 pieces without a description"),
        (frame({**listed("[null]"), "0": tensor(0, 5)}, b"1234"), "no parcel"),
        (frame({**listed("[null]"), "0": tensor(0, 4)}, b"12345"), "no parcel"),
        (frame({**listed("[null]"), "0": tensor(1, 4)}, b"1234"), "no parcel"),
        (frame({**listed("[null]"), "0": {**tensor(0, 4), "shape": [2**63, 2]}}, b"1234"), "no parcel"),
        (frame({**listed("[null]"), "0": {**tensor(0, 4), "shape": [-4]}}, b"1234"), "no parcel"),
        (frame({**listed("[1, 2]"), "0": tensor(0, 4), "1": tensor(0, 4)}, b"1234"), "no parcel"),
        (frame({**listed("[1, 2]"), "0": tensor(0, 1), "1": tensor(2, 4)}, b"1234"), "no parcel"),
    ],
    ids=range(23),
)
def test_what_is_no_parcel_is_refused_with_the_reason(data, said) -> None:
    with pytest.raises(ProtectionError, match=said):
        unpack(data)
    with pytest.raises(ProtectionError):
        from_parcel(RecordDict({f"{messages.PARCEL}.0": ConfigRecord({BLOB: data})}))


RECORD = (["a", "arrays"], b"")


@pytest.mark.parametrize(
    "pieces",
    [
        [RECORD, (["a", "arrays", "n", "float32", [2], 5], b"")],
        [RECORD, (["a", "arrays", "n", "float32", ["2"], "numpy.ndarray"], b"")],
        [RECORD, (["a", "arrays", "n", "float32", [-2], "numpy.ndarray"], b"")],
        [RECORD, (["a", "arrays", "n", "float32"], b"")],
        [(["a", "arrays", "n", "float32", [2], "numpy.ndarray"], b"")],
        [(["a", "config"], ConfigRecord().deflate()), (["a", "arrays", "n", "float32", [2], "numpy.ndarray"], b"")],
        [(None, b"")],
        [([], b"")],
        [([7, "arrays"], b"")],
        [([["a"], "arrays"], b"")],
        [(["a", "metrics"], b"no record")],
        [(["a", "config"], MetricRecord({"a": 1}).deflate())],
        [(["a", ["config"]], b"")],
        [(["a", "code"], b"")],
    ],
    ids=range(14),
)
def test_a_part_that_is_no_record_is_refused(pieces) -> None:
    with pytest.raises(ProtectionError, match="cannot be read"):
        from_parcel(RecordDict({f"{messages.PARCEL}.0": ConfigRecord({BLOB: pack(pieces)})}))


def test_a_message_that_came_as_records_is_refused() -> None:
    with pytest.raises(ProtectionError, match="no parcel"):
        from_parcel(message())
    with pytest.raises(ProtectionError, match="no parcel"):
        from_parcel(RecordDict())


@pytest.mark.slow
@parses("from_parcel", usual=2000)
@given(noise=st.binary(max_size=60), at=st.integers(0, 900), framed=st.booleans())
def test_random_bytes_are_refused_or_read_as_what_they_say(noise, at, framed) -> None:
    whole = next(iter(to_parcel(message()).values()))[BLOB]
    data = whole[:at] + noise + whole[at + len(noise) :] if framed else noise
    try:
        from_parcel(RecordDict({f"{messages.PARCEL}.0": ConfigRecord({BLOB: data})}))
    except ProtectionError:
        return
    assert framed
