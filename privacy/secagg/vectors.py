"""A masked update as bytes: its client, its session, a checksum against accidents, and the numbers.

    magic 4 | digest of the session 32 | client 8 | numbers 4 | CRC-32 of the other bytes 4 | uint32 [numbers]

little-endian; the first two numbers are the client's examples and 1, under the same masks as its weights.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from zlib import crc32

import numpy as np

from fedveil.core.errors import ProtectionError
from fedveil.privacy.fixed_point import Grid, Layout
from fedveil.privacy.plan import RESERVED
from fedveil.privacy.secagg.messages import Session

_HEADER = struct.Struct("<4s32sQI")
_CRC = struct.Struct("<I")
_MAGIC = b"FVU1"
BEFORE = _HEADER.size + _CRC.size  # bytes before the numbers


def shown(model: Mapping[str, np.ndarray], layout: Layout, settings: Mapping[str, Any]) -> bytes:
    """Return 32 bytes that bind a client's masks to the model and the settings of its round."""
    found = sha256(layout.digest)
    for name, _ in layout.shapes:
        found.update(np.ascontiguousarray(model[name], np.float32).data)
    found.update(repr(sorted((key, settings[key]) for key in settings)).encode())
    return found.digest()


def to_ring(values: np.ndarray, examples: int) -> np.ndarray:
    """Return the numbers of one client to be masked, uint32 [2 + size]: its examples, 1, and its weights modulo 2^32.

    values: int64 [size], as `fixed_point.quantize` returns them
    """
    return np.concatenate([np.array([examples, 1]), values]).astype(np.uint32)


def from_ring(total: np.ndarray, examples: int, clients: int, grid: Grid) -> np.ndarray:
    """Return the sum of weights, int64 [size], in an unmasked sum uint32 [2 + size].

    examples, clients: what the sum must hold beside them
    Raise ProtectionError where it does not: a mask is left on it, or a client sent rubbish.
    """
    signed = total.view(np.int32).astype(np.int64)
    if signed[0] != examples or signed[1] != clients:
        raise ProtectionError(
            f"the unmasked sum is not of {clients} clients with {examples:,} examples: a mask is left on it, or a client sent "
            "what the protocol does not allow"
        )
    weights = signed[RESERVED:]
    if int(np.abs(weights).max(initial=0)) > grid.most + clients:
        raise ProtectionError("the unmasked sum holds numbers beyond what clipped weights can give")
    return weights


def write_masked(session: Session, client: int, masked: np.ndarray) -> bytes:
    """Write a client's masked numbers, uint32 [session.size], as they travel."""
    header, body = _HEADER.pack(_MAGIC, session.digest, client, masked.size), masked.astype("<u4").tobytes()
    return header + _CRC.pack(crc32(body, crc32(header))) + body


def read_masked(session: Session, client: int, blob: bytes) -> np.ndarray:
    """Read the numbers that `write_masked` wrote; raise ProtectionError where these are others, or damaged."""
    wanted = BEFORE + 4 * session.size
    if len(blob) != wanted:
        raise ProtectionError(
            f"its masked update has {len(blob):,} bytes, and {session.size:,} numbers take {wanted:,}"
        )
    magic, digest, owner, size = _HEADER.unpack_from(blob)
    if magic != _MAGIC or size != session.size:
        raise ProtectionError("its update is not masked, or by another version of FedVeil")
    if digest != session.digest:
        raise ProtectionError(
            f"its masked update is of another run, round or attempt, or made with other settings (this is round {session.round}, "
            f"attempt {session.attempt})"
        )
    if owner != client:
        raise ProtectionError(f"its masked update is client {owner}'s")
    (checksum,) = _CRC.unpack_from(blob, _HEADER.size)
    if checksum != crc32(memoryview(blob)[BEFORE:], crc32(memoryview(blob)[: _HEADER.size])):
        raise ProtectionError("its masked update was damaged on the way (checksum)")
    return np.frombuffer(blob, "<u4", offset=BEFORE)
