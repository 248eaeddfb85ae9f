"""What somebody on the network sees of a deployed run: TLS, and nothing in it; without TLS, all of it."""

from __future__ import annotations

import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from helpers.captures import DISTINCT, WINDOW, other_than_tls, shared, streams, walked
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedveil.server.serving.node_gateway import HELLO

PORT = 9092  # of the gateway
OWN_WORDS = (b"anastasia", b"boniface", b"chidiebere")  # in a client's messages, and no words that everybody knows
SETTINGS = (b"ham, spam", b"winner", b"station", HELLO.encode(), FLEET_HTTP_PUBLIC_KEY_HEADER.encode())
SIDES = (("192.0.2.2", 40000, "192.0.2.1", PORT), ("192.0.2.1", PORT, "192.0.2.2", 40000))


def pcap(segments: list[tuple[int, int, bytes, int]]) -> bytes:
    """A capture of TCP segments: which side sends (0 or 1), its sequence number, its payload, its flags."""
    file = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
    for side, number, payload, flags in segments:
        source, port, target, other = SIDES[side]
        addresses = b"".join(bytes(map(int, host.split("."))) for host in (source, target))
        tcp = struct.pack(">HHIIBBHHH", port, other, number, 0, 5 << 4, flags, 0, 0, 0) + payload
        packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses + tcp
        frame = bytes(12) + b"\x08\x00" + packet + bytes(4)  # a trailer, as short frames have
        file += struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame
    return file


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12), st.randoms(), st.integers(0, 2**32 - 1))
def test_streams_are_put_together_from_segments_that_came_late_or_twice(
    parts: list[bytes], chance: random.Random, begin: int
) -> None:
    segments, at = [], 1
    for part in parts:
        segments.append((0, (begin + at) % 2**32, part, 0x18))
        at += len(part)
    segments += chance.choices(segments, k=3)
    chance.shuffle(segments)
    found = streams(pcap([(0, begin, b"", 2), (1, 7, b"", 0x12), *segments]))
    assert found == {SIDES[0]: b"".join(parts), SIDES[1]: b""}


def test_a_capture_that_misses_bytes_is_no_proof() -> None:
    with pytest.raises(ValueError, match=r"5 bytes of .* are missing"):
        streams(pcap([(0, 100, b"", 2), (0, 106, b"later", 0x18)]))
    with pytest.raises(ValueError, match="the start of"):
        streams(pcap([(0, 101, b"first", 0x18)]))
    whole = pcap([(0, 100, b"", 2)])
    with pytest.raises(ValueError, match="was cut"):
        streams(whole[:36] + struct.pack("<I", 9000) + whole[40:])


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"", ""),
        (b"\x16\x03\x01\x00\x02ab" + b"\x17\x03\x03\x00\x01c", ""),
        (b"\x16\x03\x01\x00\x02ab" + b"\x17\x03\x03\x00\x09cut", ""),  # the connection broke within a record
        (b"\x16\x03\x01\x00\x02ab" + b"\x17\x03", ""),
        (b"POST / HTTP/1.1\r\n", "byte 0: "),
        (b"\x16\x03\x01\x00\x02ab" + b"in the clear", "byte 7: "),
        (b"\x17\x02\x00\x00\x01c", "byte 0: "),  # SSL 2
        (b"\x17\x03\x04\x00\x01c", "byte 0: "),
        (b"\x18\x03\x03\x00\x01c", "byte 0: "),
        (b"\x17\x03\x03\x50\x00c", "byte 0: a record of 20480 bytes"),
    ],
    ids=["empty", "two-records", "cut-record", "cut-header", "http", "text-after-tls", "ssl-2", "version-4", "type-24", "too-long"],
)  # fmt: skip
def test_only_rows_of_tls_records_count_as_tls(stream, why) -> None:
    assert other_than_tls(stream).startswith(why)
    assert bool(other_than_tls(stream)) == bool(why)


@given(st.binary(min_size=WINDOW, max_size=300), st.binary(max_size=300), st.binary(max_size=300), st.data())
def test_a_window_of_a_secret_is_found_wherever_it_lies(
    secret: bytes, before: bytes, after: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(secret) - WINDOW))
    window = secret[start : start + WINDOW]
    content = before + window + after
    slow = {
        content[i : i + WINDOW]
        for i in range(len(content) - WINDOW + 1)
        if content[i : i + WINDOW] in secret and len(set(content[i : i + WINDOW])) >= DISTINCT
    }
    assert (shared(secret, content) in slow) if slow else (shared(secret, content) == b"")
    assert (window in slow) == (len(set(window)) >= DISTINCT)
    assert shared(secret, window[:-1]) == b""


def weights(path: Path) -> list[bytes]:
    """The tensors of a model that are long enough to be looked for."""
    return [value.tobytes() for value in load_file(path).values() if value.nbytes >= 4 * WINDOW]


@pytest.mark.long
def test_tls_hides_all_that_plain_http_shows(tmp_path) -> None:
    with ThreadPoolExecutor() as pool:  # they mostly wait
        tls = pool.submit(walked, tmp_path / "tls", "--protection", "none", "--capture")
        bare = pool.submit(walked, tmp_path / "bare", "--insecure", "--protection", "none", "--capture")
        hidden, plain = tls.result(), bare.result()
    models = ["model.safetensors", "best.safetensors"]
    shown = b"\n".join(plain.streams.values())
    for name in models:
        assert all(tensor in shown for tensor in weights(plain.record / name)), name
    assert all(word in shown for word in SETTINGS)
    assert not any(word in shown for word in OWN_WORDS), "a client's messages left it"
    assert all(other_than_tls(stream) for stream in plain.streams.values() if stream)

    said = hidden.streams
    passed = b"\n".join(said.values())
    ledger = pd.read_csv(hidden.record / "ledger.csv")
    assert len(passed) > ledger.bytes_up.sum() + ledger.bytes_down.sum(), "the capture does not hold the run"
    assert all(PORT in (source, target) for _, source, _, target in said)
    assert {words for words in map(other_than_tls, said.values()) if words} == set()
    keys = [file.read_bytes() for file in sorted((hidden.folder / "operator").rglob("*.key"))]
    tensors = [tensor for name in models for tensor in weights(hidden.record / name)]
    assert len(keys) == 5  # of three clients, the server and the authority
    assert shared(b"".join([shown, *tensors, *keys]), passed) == b""
    assert not any(word in passed for word in (*SETTINGS, *OWN_WORDS))
