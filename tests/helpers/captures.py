"""What passed a network interface, as tcpdump wrote it down: TCP streams, the TLS records in them, and what can be read there.

`walked` lets docs/deploy/three_machines.sh make such a capture.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from helpers.machines import need_root

SCRIPT = Path(__file__).parents[2] / "docs" / "deploy" / "three_machines.sh"
WINDOW = 16  # bytes in a row that give away where they are from
DISTINCT = 8  # different bytes in such a window; fewer say nothing
LARGEST_RECORD = 2**14 + 256  # bytes in a record of TLS 1.3 (RFC 8446, section 5.2)
PATIENCE = 420  # seconds for a whole walk, on a machine that others use too

Stream = tuple[str, int, str, int]  # address and port of who sends, and of who receives


@dataclass(frozen=True)
class Walk:
    """A finished walk: its folder, with one of each machine in it, and what it said."""

    folder: Path
    said: str

    @property
    def record(self) -> Path:
        """The record of its one run, on the server."""
        (record,) = (self.folder / "server" / "state" / "runs").iterdir()
        return record

    @property
    def streams(self) -> dict[Stream, bytes]:
        """What passed the server's network interface."""
        return streams((self.folder / "capture.pcap").read_bytes())


def walked(folder: Path, *options: str) -> Walk:
    """Walk with three clients in namespaces of their own; skip the test, loudly, where this machine does not let it."""
    need_root()
    if shutil.which("tcpdump") is None:
        pytest.skip("NOT TESTED: needs tcpdump to capture traffic (Debian: apt-get install tcpdump)")
    process = begin(folder, *options)
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except BaseException:
        end(process)
        raise
    logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*/output.txt"))]
    assert process.returncode == 0, "\n".join([said, *logs])
    assert left_over(process.pid, folder) == []
    return Walk(folder, said)


def begin(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the walk, with the FedVeil that is tested, and a home folder beside the walk's."""
    environment = {**os.environ, "FEDVEIL": str(Path(sys.executable).with_name("fedveil")), "HOME": str(folder.parent)}
    return subprocess.Popen(
        [SCRIPT, *options, folder], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: subprocess.Popen[str]) -> str:
    """Interrupt a walk, which takes down what it made; return what it said."""
    process.terminate()
    said, _ = process.communicate(timeout=PATIENCE)
    return said


def left_over(process: int, folder: Path) -> list[str]:
    """Namespaces of a walk, by the id of its process, and processes that still run in its folder."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    found = [name for name in listed if name.startswith(f"fv{process}-")]
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if Path(os.readlink(link)).is_relative_to(folder):
                found.append(f"process {link.parent.name}")
    return found


def streams(capture: bytes) -> dict[Stream, bytes]:
    """All that each side of each TCP connection said, in order.

    capture: a pcap file of an Ethernet interface, IPv4
    Raise ValueError where it is another file, or where a part of a stream is missing.
    """
    magic, *_, link = struct.unpack_from("<IHHiIII", capture)
    if magic not in (0xA1B2C3D4, 0xA1B23C4D) or link != 1:
        raise ValueError(f"no pcap file of an Ethernet interface: magic {magic:08x}, link {link}")
    parts: dict[Stream, list[tuple[int, bytes]]] = {}
    first: dict[Stream, int] = {}
    for frame in _frames(capture):
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:  # IPv4, TCP
            continue
        packet = frame[14 : 14 + int.from_bytes(frame[16:18])]
        segment = packet[(packet[0] & 15) * 4 :]
        source, target, number = struct.unpack_from(">HHI", segment)
        stream = (_address(packet[12:16]), source, _address(packet[16:20]), target)
        if segment[13] & 2:  # SYN counts as a byte
            first[stream] = number + 1
            parts.setdefault(stream, [])
        elif payload := segment[(segment[12] >> 4) * 4 :]:
            if stream not in first:
                raise ValueError(f"the start of {stream} is missing")
            parts[stream].append(((number - first[stream]) % 2**32, payload))
    return {stream: _whole(stream, found) for stream, found in parts.items()}


def _frames(capture: bytes) -> Iterator[bytes]:
    at = 24
    while at < len(capture):
        length, real = struct.unpack_from("<II", capture, at + 8)
        if length != real:
            raise ValueError(f"a packet of {real} bytes was cut to {length}")
        yield capture[at + 16 : at + 16 + length]
        at += 16 + length


def _whole(stream: Stream, parts: list[tuple[int, bytes]]) -> bytes:
    """Segments in order, those sent again taken once."""
    whole = bytearray()
    for start, payload in sorted(parts):
        if start > len(whole):
            raise ValueError(f"{start - len(whole)} bytes of {stream} are missing")
        whole += payload[len(whole) - start :]
    return bytes(whole)


def _address(raw: bytes) -> str:
    return ".".join(map(str, raw))


def other_than_tls(stream: bytes) -> str:
    """Why a stream is not a row of TLS records from its first byte to its last; empty where it is.

    A record: its type, 20 to 23; its version, 3.1 to 3.3; the length of what follows (RFC 8446, section 5.1)
    """
    at = 0
    while at < len(stream):
        head = stream[at : at + 5]
        if not 20 <= head[0] <= 23 or head[1:2] not in (b"\x03", b"") or head[2:3] not in (b"\1", b"\2", b"\3", b""):
            return f"byte {at}: {head!r} begins no TLS record"
        length = int.from_bytes(head[3:5])
        if len(head) == 5 and length > LARGEST_RECORD:
            return f"byte {at}: a record of {length} bytes"
        at += 5 + length
    return ""


def windows(content: bytes) -> np.ndarray:
    """A number for each `WINDOW` bytes in a row, uint64 [n - 15]; the same for the same bytes."""
    if len(content) < WINDOW:
        return np.zeros(0, np.uint64)
    eights = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), 8)
    words = np.ascontiguousarray(eights).view("<u8").reshape(-1)
    mixed = words * np.uint64(0x9E3779B97F4A7C15)
    return (mixed[:-8] ^ (mixed[:-8] >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + words[8:]


def shared(secret: bytes, content: bytes) -> bytes:
    """Some `WINDOW` bytes in a row that lie in both, `DISTINCT` of them different; empty where there are none."""
    known = windows(secret)
    for at in np.flatnonzero(np.isin(windows(content), known)):
        window = content[at : at + WINDOW]
        if len(set(window)) >= DISTINCT and window in secret:
            return window
    return b""
