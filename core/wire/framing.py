"""Framing of a message: its many pieces of bytes travel as one, since Flower sends each object by calls of its own.

The frame is a safetensors file: the pieces are its tensors, uint8, and its metadata holds a description of each, as JSON.
safetensors refuses a file whose pieces overlap, are cut, or leave bytes over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedveil.core.errors import ProtectionError

LARGEST_HEADER = 1 << 20  # bytes
_LENGTH = 8  # bytes of the header's length, at the start of a safetensors file

Piece = tuple[Any, bytes]  # a description that JSON can hold, and what it describes


def pack(pieces: Sequence[Piece]) -> bytes:
    """Frame the pieces, in order, as one."""
    arrays = {str(number): np.frombuffer(data, np.uint8) for number, (_, data) in enumerate(pieces)}
    return save(arrays, {"pieces": json.dumps([description for description, _ in pieces])})


def unpack(parcel: bytes) -> list[Piece]:
    """Read what `pack` framed; raise ProtectionError where it is anything else, whatever a stranger made of it."""
    length = int.from_bytes(parcel[:_LENGTH], "little")
    if length > LARGEST_HEADER:
        raise ProtectionError(
            f"its message is no parcel of FedVeil: a header of {length:,} bytes, where {LARGEST_HEADER:,} are allowed"
        )
    try:
        found = {name: tensor["data"] for name, tensor in deserialize(parcel)}  # type: ignore[no-untyped-call]
        descriptions = json.loads(json.loads(parcel[_LENGTH : _LENGTH + length])["__metadata__"]["pieces"])
        pieces = [(text, bytes(found.pop(str(number)))) for number, text in enumerate(descriptions)]
    except SafetensorError as error:
        raise ProtectionError(f"its message is no parcel of FedVeil: {error}") from None
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ProtectionError("its message does not describe the pieces that it holds") from None
    if found:
        raise ProtectionError(f"its message has {len(found)} pieces without a description")
    return pieces
