"""Framing: the many pieces of a message travel as one, because Flower makes separate calls for each object.

The frame is a safetensors file: its tensors are the pieces, uint8, and its metadata holds their descriptions as JSON.
safetensors refuses a file whose pieces overlap, are cut off, or leave bytes over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading

LARGEST_HEADER = 1 << 20  # bytes
_LENGTH = 8  # bytes of the header's length, at the start of a safetensors file

Piece = tuple[Any, bytes]  # (a description that JSON can hold, the bytes)


def pack(pieces: Sequence[Piece]) -> bytes:
    """Frame the pieces, in order, as one."""
    arrays = {str(number): np.frombuffer(data, np.uint8) for number, (_, data) in enumerate(pieces)}
    return save(arrays, {"pieces": json.dumps([description for description, _ in pieces])})


def unpack(parcel: bytes) -> list[Piece]:
    """Return the pieces of a frame that `pack` made; raise ProtectionError for any other bytes, also forged ones."""
    length = int.from_bytes(parcel[:_LENGTH], "little")
    if length > LARGEST_HEADER:
        raise ProtectionError(
            f"its message is no parcel of FedVeil: a header of {length:,} bytes, where {LARGEST_HEADER:,} are allowed"
        )
    with reading(lambda why: ProtectionError(f"its message is no parcel of FedVeil: {why}")):
        found = {name: tensor["data"] for name, tensor in deserialize(parcel)}  # type: ignore[no-untyped-call]
    with reading(lambda _: ProtectionError("its message does not describe the pieces that it holds")):
        descriptions = json.loads(json.loads(parcel[_LENGTH : _LENGTH + length])["__metadata__"]["pieces"])
        pieces = [(text, bytes(found.pop(str(number)))) for number, text in enumerate(descriptions)]
    if found:
        raise ProtectionError(f"its message has {len(found)} pieces without a description")
    return pieces
