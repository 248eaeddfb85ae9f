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

from fedveil.core import messages
from fedveil.core.errors import ProtectionError
from fedveil.core.messages import BLOB, from_arrays, from_parcel, to_arrays, to_parcel
from fedveil.core.parcels import LARGEST_HEADER, MAGIC, Part, pack, unpack

NAMES = st.text(max_size=8)
PIECES = st.tuples(st.none() | st.integers() | st.lists(NAMES, max_size=3), st.binary(max_size=40))
PARTS = st.lists(st.builds(Part, NAMES, NAMES, st.lists(PIECES, max_size=4).map(tuple)), max_size=4)


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


@given(PARTS)
def test_parts_come_out_as_they_went_in(parts) -> None:
    expected = [Part(p.name, p.kind, tuple((json.loads(json.dumps(d)), b) for d, b in p.pieces)) for p in parts]
    assert unpack(pack(parts)) == expected


@pytest.mark.parametrize("piece", [7, 100, 5_000_000])
def test_a_message_is_the_same_after_its_way_in_one_record_or_many(piece, monkeypatch) -> None:
    monkeypatch.setattr(messages, "PIECE", piece)
    parcel = to_parcel(message())
    sizes = [len(record[BLOB]) for record in parcel.values()]
    assert max(sizes) <= piece
    assert (len(sizes) == 1) == (piece == 5_000_000)
    same(message(), from_parcel(parcel))
    weights = from_arrays(from_parcel(to_parcel(RecordDict({"arrays": to_arrays({"w": np.eye(3)})})))["arrays"])
    assert np.array_equal(weights["w"], np.eye(3))


def test_a_parcel_weighs_little_more_than_what_is_in_it() -> None:
    content = RecordDict({"arrays": to_arrays({f"layer{i}": np.zeros((64, 64), np.float32) for i in range(8)})})
    parcel = sum(len(record[BLOB]) for record in to_parcel(content).values())
    assert parcel < 1.01 * messages.wire_bytes(content)


def frame(header: bytes, body: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<I", len(header)) + header + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no parcel"),
        (b"FVP2" + bytes(8), "no parcel"),
        (MAGIC + struct.pack("<I", LARGEST_HEADER + 1), "header of 1,048,577 bytes"),
        (frame(b"[[1"), "cannot be read"),
        (frame(b"3"), "cannot be read"),
        (frame(b'{"a": 1}'), "cannot be read"),
        (frame(b"[" * 100_000), "cannot be read"),
        (frame(b'[["a", "metrics", [[null, 5]]]]', b"1234"), "a piece of 5 bytes is not there"),
        (frame(b'[["a", "metrics", [[null, -1]]]]'), "a piece of -1 bytes is not there"),
        (frame(b'[["a", "metrics", [[null, 1e9]]]]'), "a piece of 1000000000.0 bytes is not there"),
        (frame(b'[["a", "metrics", [[null, true]]]]', b"1"), "a piece of True bytes is not there"),
        (frame(b'[[7, "metrics", []]]'), "a part without a name"),
        (frame(b"[]", b"more"), "4 bytes that belong to nothing"),
    ],
    ids=range(13),
)
def test_what_is_no_parcel_is_refused_with_the_reason(data, said) -> None:
    with pytest.raises(ProtectionError, match=said):
        unpack(data)
    with pytest.raises(ProtectionError):
        from_parcel(RecordDict({f"{messages.PARCEL}.0": ConfigRecord({BLOB: data})}))


@pytest.mark.parametrize(
    "part",
    [
        Part("a", "arrays", ((["n", "float32", [2], 5], b""),)),
        Part("a", "arrays", ((["n", "float32", ["2"], "numpy.ndarray"], b""),)),
        Part("a", "arrays", ((["n", "float32", [-2], "numpy.ndarray"], b""),)),
        Part("a", "arrays", ((["n", "float32"], b""),)),
        Part("a", "arrays", ((None, b""),)),
        Part("a", "metrics", ((None, b"no record"),)),
        Part("a", "config", ((None, MetricRecord({"a": 1}).deflate()),)),
        Part("a", "metrics", ()),
        Part("a", "code", ((None, b""),)),
    ],
    ids=range(9),
)
def test_a_part_that_is_no_record_is_refused(part) -> None:
    with pytest.raises(ProtectionError, match="cannot be read"):
        from_parcel(RecordDict({f"{messages.PARCEL}.0": ConfigRecord({BLOB: pack([part])})}))


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
    assert data.startswith(MAGIC)
