"""Many named pieces of bytes as one: what a message holds travels between machines as few objects, each of which costs a call.

    magic 4 | length of the header, uint32 little-endian | header, JSON | the pieces, one after another

The header lists `[name, kind, [[description, length], ...]]` for each part, in order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedveil.core.errors import ProtectionError

MAGIC = b"FVP1"
LARGEST_HEADER = 1 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """A part of a parcel: its name, its kind, and pieces of bytes, each with a description that JSON can hold."""

    name: str
    kind: str
    pieces: tuple[tuple[Any, bytes], ...]


def pack(parts: Sequence[Part]) -> bytes:
    """The parts as one piece of bytes."""
    header = json.dumps([
        [part.name, part.kind, [[description, len(data)] for description, data in part.pieces]] for part in parts
    ]).encode()  # fmt: skip
    pieces = [data for part in parts for _, data in part.pieces]
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *pieces])


def unpack(parcel: bytes) -> list[Part]:
    """The parts of a parcel; raise ProtectionError where it is none, whatever a stranger made of it."""
    start = len(MAGIC) + 4
    if len(parcel) < start or not parcel.startswith(MAGIC):
        raise ProtectionError("its message is no parcel of FedVeil")
    (length,) = struct.unpack_from("<I", parcel, len(MAGIC))
    if length > LARGEST_HEADER:
        raise ProtectionError(f"its message has a header of {length:,} bytes; {LARGEST_HEADER:,} are allowed")
    try:
        listed = json.loads(parcel[start : start + length])
        parts, at = [], start + length
        for name, kind, pieces in listed:
            found = []
            for description, size in pieces:
                if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(parcel) - at:
                    raise ProtectionError(f"its message is cut: a piece of {size!r:.40} bytes is not there")
                found.append((description, parcel[at : at + size]))
                at += size
            if not isinstance(name, str) or not isinstance(kind, str):
                raise ProtectionError("its message has a part without a name")
            parts.append(Part(name, kind, tuple(found)))
    except (ValueError, TypeError, RecursionError):
        raise ProtectionError("its message has a header that cannot be read") from None
    if at != len(parcel):
        raise ProtectionError(f"its message has {len(parcel) - at:,} bytes that belong to nothing")
    return parts
