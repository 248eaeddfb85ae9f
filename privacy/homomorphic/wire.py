"""Encrypted messages: a header of 276 bytes, chunks, tags, and of a sum who is in it. All is checked before decryption.

All numbers are little endian. Offsets, for other implementations:

      0  magic, b"FVHE"                               4  version of this format, uint16
      6  kind: 0 upload, 1 aggregate, uint8           7  scheme: 1 BFV, 2 CKKS, uint8
      8  flags: 1 seeded, 2 two numbers a slot        9  SEAL's version: major, minor, uint8 each
     11  tags a chunk, uint8                         12  N, uint32
     16  data prime, uint64                          24  special prime, uint64
     32  BFV: plain modulus, uint64                  40  CKKS: log2 of the scale, uint16
     42  grid: -log2 of the step, int16              44  BFV: bits of each number in a slot, uint32
     48  grid: largest absolute value, float64       56  key id, 16 bytes
     72  run id, 16 bytes                            88  digest of names and shapes, 16 bytes
    104  SEAL's parms_id, 32 bytes                  136  round, uint32
    140  client that sent an upload, uint32         144  clients in it, uint32
    148  numbers a chunk, uint32                    152  chunks, uint32
    156  bytes a chunk, uint32                      160  numbers in all, uint64
    168  examples in it, uint64                     176  examples announced for the cohort, uint64
    184  SHA-256 of the model that clients trained   216  SHA-256 of the settings that they trained with
    248  nonce of an upload, 16 bytes               264  bytes after the header, uint64
    272  CRC-32 of bytes 0 to 271 and of all after the header, uint32

A chunk of an aggregate is c0 then c1, N coefficients each, each in as many whole bytes as the data prime takes; a chunk
of a seeded upload is 64 bytes of seed, then c0. `seal.write_ciphertext` makes SEAL's bytes of it. Its numbers start
with the examples and the clients; the last chunk ends in zeros. After the chunks come their tags (`mac.py`), chunk by
chunk, each in as many bytes as a coefficient; after the tags of an aggregate 28 bytes for each client in it: its
number, uint32; its examples, uint64; the nonce of its upload.

The checksum detects accidents. TLS protects against somebody on the network, the tags against the server itself.
Format 1, of FedVeil 0.1.0, had a header of 196 bytes, with the length at 184 and the CRC-32 at 192, and no tags.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Literal
from zlib import crc32

import numpy as np

from fedveil.core.errors import ProtectionError
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import ClientKey, ServerContext, fingerprint
from fedveil.privacy.homomorphic.lattice import HEADROOM, Form
from fedveil.privacy.homomorphic.mac import (
    DIGEST,
    NONCE,
    Proof,
    Sender,
    count_tags,
    proof_bytes,
    read_senders,
    write_senders,
)
from fedveil.privacy.homomorphic.seal import SCHEMES, Buffer, Ring, trim, untrim
from fedveil.privacy.plan import Plan

MAGIC, FORMAT = b"FVHE", 2
HEADER = struct.Struct("<4sHBBBBBBIQQQHhId16s16s16s32sIIIIIIQQQ32s32s16sQ")
_CRC = struct.Struct("<I")
_KINDS: tuple[Literal["upload"], Literal["aggregate"]] = ("upload", "aggregate")
_SEEDED, _COMPLEX = 1, 2
_RUN, _ROUND = 72, 136  # offsets of the run and the round
# Fields that a receiver learns from a message are checked for their range, or by its tags; all others must be as expected.
_LEARNT = {
    "upload": ("seeded", "complex", "examples", "nonce"),
    "aggregate": ("clients", "examples", "reference", "model", "settings"),
}


@dataclass(frozen=True)
class Header:
    """The fields of an encrypted message's header.

    version: of SEAL; complex: CKKS with two numbers a slot; key_id, run, layout: 16 bytes each; size: numbers in all
    client: who sent an upload; clients, examples: in the sum; reference: n_ref, the examples announced for the cohort
    model, settings: SHA-256 of the model that clients received, and of the round's settings; nonce: of an upload
    """

    kind: Literal["upload", "aggregate"]
    version: tuple[int, int]
    ring: Ring
    scale_bits: int
    limit: float
    bits: int
    key_id: bytes
    run: bytes
    layout: bytes
    round: int
    client: int
    size: int
    seeded: bool
    complex: bool
    clients: int
    examples: int
    reference: int
    model: bytes = bytes(DIGEST)
    settings: bytes = bytes(DIGEST)
    nonce: bytes = bytes(NONCE)

    @property
    def form(self) -> Form:
        """How the numbers lie in ciphertexts."""
        return Form(self.ring.lattice, self.size, self.complex)

    @property
    def sender(self) -> Sender:
        """Who sent an upload."""
        return Sender(self.client, self.examples, self.nonce)

    @property
    def terms(self) -> bytes:
        """SHA-256 of all fields that the uploads of a sum share with it: what their tags are bound to."""
        one = replace(self, kind="upload", client=0, seeded=False, clients=0, examples=0, nonce=bytes(NONCE))
        return sha256(_pack(one, 0)).digest()


def expect(
    kind: Literal["upload", "aggregate"],
    plan: Plan,
    key: ClientKey | ServerContext,
    *,
    run: bytes,
    round: int,
    layout: Layout,
    client: int = 0,
    reference: int = 0,
    complex: bool = True,
    model: bytes = bytes(DIGEST),
    settings: bytes = bytes(DIGEST),
) -> Header:
    """Return the header that a message of a run must have, for `read`.

    `read` learns seeded, complex, examples and nonce of an upload from its sender; clients, examples, reference, model
    and settings of an aggregate, which its tags then confirm.
    The sender replaces those for `write`: `dataclasses.replace(expected, seeded=True, examples=n)`.
    """
    return Header(
        kind, key.version, key.ring, plan.scale_bits, plan.grid.limit, plan.grid.bits, key.key_id, run, layout.digest,
        round, client, layout.size, False, complex, 1 if kind == "upload" else 0, 0, reference, model, settings,
    )  # fmt: skip


def write(header: Header, body: Buffer, proof: Proof) -> bytes:
    """Write a message: header, checksum, body, tags, and of an aggregate the clients in it."""
    after = _after(header, proof)
    head = _pack(header, len(body) + len(after))
    return b"".join((head, _CRC.pack(crc32(after, crc32(body, crc32(head)))), body, after))


def write_around(header: Header, message: np.ndarray, proof: Proof) -> np.ndarray:
    """Turn `Adder.message` into a message, in place, and return it without the room that is left.

    Raise ProtectionError where the header is of other sizes.
    """
    end, after = HEADROOM + header.form.bytes(header.seeded), _after(header, proof)
    if len(message) < end + len(after):
        raise ProtectionError(f"a header of a sum of {end - HEADROOM:,} bytes around {len(message) - HEADROOM:,}")
    message[end : end + len(after)] = np.frombuffer(after, np.uint8)
    message = message[: end + len(after)]
    rest = message[HEADROOM:]
    head = _pack(header, len(rest))
    message[:HEADROOM] = np.frombuffer(head + _CRC.pack(crc32(rest.data, crc32(head))), np.uint8)
    return message


def read(blob: Buffer, expected: Header) -> tuple[Header, memoryview, Proof]:
    """Return the header, the body and the proof of a message; the body is a view of it, and the proof is not checked.

    Raise ProtectionError where it is damaged, or, naming the first such field, where a field is not as expected.
    """
    view = memoryview(blob).cast("B")
    start = HEADER.size + _CRC.size
    if len(view) < start:
        raise ProtectionError(
            f"an encrypted message of {len(view)} bytes: shorter than its header of {start}; it was cut short"
        )
    magic, form = struct.unpack_from("<4sH", view)
    if magic != MAGIC:
        raise ProtectionError("not an encrypted message of FedVeil: it does not start as one")
    if form != FORMAT:
        raise ProtectionError(
            f"an encrypted message in format {form}, and this FedVeil reads {FORMAT}; use one version everywhere"
        )
    head, rest = view[: HEADER.size], view[start:]
    length = HEADER.unpack(head)[-1]
    if length != len(rest):
        raise ProtectionError(
            f"an encrypted message that announces {length:,} bytes and has {len(rest):,}: it was cut or joined"
        )
    if _CRC.unpack_from(view, HEADER.size)[0] != crc32(rest, crc32(head)):
        raise ProtectionError("an encrypted message whose checksum is wrong: it was damaged on the way or on a disk")
    header = _unpack(head)
    _compare(header, expected)
    _check(header)
    ring, body = header.ring, header.form.bytes(header.seeded)
    tags = body + proof_bytes(ring, header.form.chunks, 0)
    if bytes(head) != _pack(header, length) or length != body + _after_bytes(header):
        raise ProtectionError(
            f"an encrypted message whose header contradicts itself: {header.size:,} numbers in {length:,} bytes"
        )
    numbers = untrim(rest[body:tags], ring.width).reshape(header.form.chunks, -1)
    if int(numbers.max()) >= ring.prime:
        raise ProtectionError(f"an encrypted {header.kind} with a tag that is not below the prime {ring.prime}")
    senders = (header.sender,) if header.kind == "upload" else read_senders(rest[tags:])
    return header, rest[:body], Proof(numbers, senders)


def run_of(blob: Buffer) -> bytes:
    """Return the run that a message says it is of, without any check; zeros where it is too short."""
    return bytes(blob[_RUN : _RUN + 16]) if len(blob) >= _RUN + 16 else bytes(16)


def round_of(blob: Buffer) -> int:
    """Return the round that a message says it is of, without any check; 0 where it is too short.

    For readers of messages that they stored themselves.
    """
    return int(struct.unpack_from("<I", blob, _ROUND)[0]) if len(blob) >= _ROUND + 4 else 0


def _after(header: Header, proof: Proof) -> bytes:
    """Return what follows the chunks: tags, and the senders of an aggregate."""
    tags = trim(proof.tags.reshape(-1), header.ring.width).tobytes()
    return tags + (write_senders(proof.senders) if header.kind == "aggregate" else b"")


def _after_bytes(header: Header) -> int:
    return proof_bytes(header.ring, header.form.chunks, header.clients if header.kind == "aggregate" else 0)


def _pack(header: Header, length: int) -> bytes:
    ring, form = header.ring, header.form
    scheme = next(number for number, name in SCHEMES.items() if name == ring.scheme)
    flags = _SEEDED * header.seeded | _COMPLEX * header.complex
    field_bits = ring.lattice.field_bits if ring.scheme == "bfv" else 0
    return HEADER.pack(
        MAGIC, FORMAT, _KINDS.index(header.kind), scheme, flags, *header.version, count_tags(ring.prime), ring.degree,
        ring.prime, ring.special, ring.plain, header.scale_bits, header.bits, field_bits, header.limit, header.key_id, header.run, header.layout,
        ring.parms_id, header.round, header.client, header.clients, form.numbers, form.chunks,
        form.chunk_bytes(header.seeded), header.size, header.examples, header.reference, header.model, header.settings,
        header.nonce, length,
    )  # fmt: skip


def _unpack(head: Buffer) -> Header:
    """Return the header in its bytes, without the fields that follow from others: `read` compares those."""
    (
        _, _, kind, scheme, flags, major, minor, _, degree, prime, special, plain, scale_bits, bits, _, limit, key_id,
        run, layout, _, round_, client, clients, _, _, _, size, examples, reference, model, settings, nonce, _,
    ) = HEADER.unpack(head)  # fmt: skip
    if kind >= len(_KINDS) or scheme not in SCHEMES:
        raise ProtectionError(f"an encrypted message of kind {kind} and scheme {scheme}, which do not exist")
    return Header(
        _KINDS[kind], (major, minor), Ring(SCHEMES[scheme], degree, prime, special, plain), scale_bits, limit, bits,
        key_id, run, layout, round_, client, size, bool(flags & _SEEDED), bool(flags & _COMPLEX), clients, examples,
        reference, model, settings, nonce,
    )  # fmt: skip


def _compare(header: Header, expected: Header) -> None:
    """Raise ProtectionError for the first field that differs."""
    if header.kind != expected.kind:
        raise ProtectionError(f"an encrypted {header.kind}, where an encrypted {expected.kind} was expected")
    for name, label, words in _FIELDS:
        found, wanted = _value(header, name), _value(expected, name)
        if name not in _LEARNT[header.kind] and found != wanted:
            raise ProtectionError(
                f"an encrypted {header.kind} with {label} {words(found)}, where {label} {words(wanted)} was expected"
            )


def _check(header: Header) -> None:
    """Check the range of the fields that the receiver learns from the message."""
    most = int(header.limit * 2.0**header.bits)
    if not 0 < header.reference <= most:
        raise ProtectionError(
            f"{header.reference:,} examples announced for the cohort, and this grid counts 1 to {most:,}; take a larger "
            "privacy.protection.range, or a profile with a finer grid"
        )
    if not 0 < header.examples <= header.reference:
        raise ProtectionError(
            f"{header.examples:,} examples in an encrypted {header.kind}, of {header.reference:,} announced for the cohort"
        )
    if not 0 < header.clients <= header.examples:
        raise ProtectionError(
            f"{header.clients:,} clients with {header.examples:,} examples in an encrypted {header.kind}"
        )
    if header.ring.scheme == "bfv" and not header.complex:
        raise ProtectionError("an encrypted message in BFV with one number a slot, where two are expected")


def _value(header: Header, name: str) -> object:
    return getattr(header.ring if name in _RING else header, name)


def _plain(value: object) -> str:
    return str(value)


def _hex(value: object) -> str:
    return fingerprint(value) if isinstance(value, bytes) else str(value)


def _dotted(value: object) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _packing(value: object) -> str:
    return "two numbers a slot" if value else "one number a slot"


def _halves(value: object) -> str:
    return "of one polynomial and a seed" if value else "of two polynomials"


_RING = {field.name for field in fields(Ring)}
_FIELDS: tuple[tuple[str, str, Callable[[object], str]], ...] = (
    ("scheme", "scheme", _plain),
    ("version", "SEAL's version", _dotted),
    ("degree", "degree", _plain),
    ("prime", "data prime", _plain),
    ("special", "special prime", _plain),
    ("plain", "plain modulus", _plain),
    ("scale_bits", "scale, in bits,", _plain),
    ("limit", "privacy.protection.range", _plain),
    ("bits", "grid, in bits,", _plain),
    ("key_id", "key", _hex),
    ("run", "run", _hex),
    ("round", "round", _plain),
    ("layout", "layout of tensors", _hex),
    ("size", "size", _plain),
    ("client", "client", _plain),
    ("complex", "packing", _packing),
    ("seeded", "ciphertexts", _halves),
    ("clients", "number of clients", _plain),
    ("examples", "number of examples", _plain),
    ("reference", "announced number of examples", _plain),
    ("model", "model trained", _hex),
    ("settings", "settings of the round", _hex),
    ("nonce", "nonce", _hex),
)
