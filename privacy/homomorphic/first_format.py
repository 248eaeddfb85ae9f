"""Encrypted models of FedVeil 0.1.0, which nothing authenticates: their owner may open them, clients never use them."""

from __future__ import annotations

import struct
from dataclasses import replace
from zlib import crc32

from fedveil.core.errors import ProtectionError
from fedveil.privacy.fixed_point import Layout, Parameters, dequantize, unflatten
from fedveil.privacy.homomorphic.keys import ClientKey
from fedveil.privacy.homomorphic.lattice import Encryptor
from fedveil.privacy.homomorphic.seal import SCHEMES, Buffer
from fedveil.privacy.homomorphic.wire import MAGIC, Header, expect, round_of, run_of
from fedveil.privacy.plan import Plan

FORMAT = 1
HEADER = struct.Struct("<4sHBBBBBxIQQQHhId16s16s16s32sIIIIIIQQQQ")  # offsets as in `wire.py`, up to 184
_CRC = struct.Struct("<I")


def format_of(blob: Buffer) -> int:
    """Return the format that an encrypted message says it is in, without any check; 0 where it is none."""
    return int(struct.unpack_from("<H", blob, 4)[0]) if len(blob) >= 6 and bytes(blob[:4]) == MAGIC else 0


def open_first(blob: Buffer, key: ClientKey, plan: Plan, layout: Layout) -> Parameters:
    """Decrypt an aggregate in format 1, whoever made it; raise ProtectionError where it is damaged or another key's."""
    start = HEADER.size + _CRC.size
    if format_of(blob) != FORMAT or len(blob) < start:
        raise ProtectionError(f"no encrypted model in format {FORMAT}, which FedVeil 0.1.0 wrote")
    view = memoryview(blob).cast("B")
    head, body = view[: HEADER.size], view[start:]
    if _CRC.unpack_from(view, HEADER.size)[0] != crc32(body, crc32(head)):
        raise ProtectionError("an encrypted model whose checksum is wrong: it was damaged on the way or on a disk")
    clients, size, examples, reference = struct.unpack_from("<I12xQQQ", view, 144)
    encryptor = Encryptor(key, plan)
    expected = expect(
        "aggregate", plan, key, run=run_of(blob), round=round_of(blob), layout=layout, complex=encryptor.complex
    )
    header = replace(expected, clients=clients, size=size, examples=examples, reference=reference)
    if bytes(head) != _pack(header, len(body)) or size != layout.size or not 0 < examples <= reference:
        raise ProtectionError(
            "an encrypted model of another key, network or [privacy] than the record's, or a damaged one"
        )
    total = encryptor.decrypt(body, size, examples, clients)
    return unflatten(dequantize(total, examples, reference, plan.grid), layout)


def _pack(header: Header, length: int) -> bytes:
    ring, form = header.ring, header.form
    scheme = next(number for number, name in SCHEMES.items() if name == ring.scheme)
    field_bits = ring.lattice.field_bits if ring.scheme == "bfv" else 0
    return HEADER.pack(
        MAGIC, FORMAT, 1, scheme, 2 * header.complex, *header.version, ring.degree, ring.prime, ring.special, ring.plain,
        header.scale_bits, header.bits, field_bits, header.limit, header.key_id, header.run, header.layout,
        ring.parms_id, header.round, header.client, header.clients, form.numbers, form.chunks, form.chunk_bytes(False),
        header.size, header.examples, header.reference, length,
    )  # fmt: skip
