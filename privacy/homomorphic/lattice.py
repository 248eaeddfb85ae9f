"""CKKS and BFV: clients encrypt whole numbers, the server adds ciphertexts unread, clients decrypt the sum.

A vector travels in chunks of one ciphertext each. A chunk starts with two reserved numbers: the client's examples, and
1 for the client itself. In the sum they are the total of examples and the number of clients, so decryption reveals a
wrong key, a lost or doubled client, a missing chunk or an overflow. They are no defence against a server that lies on
purpose: `mac.py` is, whose check comes before decryption.

CKKS: a slot holds two numbers, in its real and imaginary part (compact), or one in its real part; decrypted numbers are
rounded to the grid. BFV: two numbers share a slot, q[0] + q[1] 2^field_bits. Either way the sum is exact.

Compact ciphertexts need SEAL's own interface (`tenseal.sealapi`): complex slots, and a seed in place of half a fresh
ciphertext. Where it is missing, TenSEAL's public interface does the same in more bytes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import numpy as np
import tenseal  # type: ignore[import-untyped]

from fedveil.core.errors import ProtectionError
from fedveil.privacy.homomorphic.keys import ClientKey, ServerContext, check_lattice
from fedveil.privacy.homomorphic.mac import proof_bytes
from fedveil.privacy.homomorphic.parameters import Lattice
from fedveil.privacy.homomorphic.seal import (
    SEED,
    Buffer,
    Ciphertext,
    Ring,
    Scratch,
    read_ciphertext,
    read_vector,
    trim,
    untrim,
    write_ciphertext,
    write_vector,
)
from fedveil.privacy.homomorphic.seeds import SeedExpander
from fedveil.privacy.plan import RESERVED, Plan

HEADROOM = 276  # bytes before a sum, where `wire.write_around` puts a header without copying the sum
PENDING = 32  # clients whose seeds are expanded together: 16 kB each at a million numbers
EXPANDED = 4  # chunks whose seeds are expanded together: 33 kB each at degree 4096


@dataclass(frozen=True)
class Form:
    """How a vector of `size` numbers lies in ciphertexts.

    complex: two numbers a slot, under CKKS as a complex number (BFV: True)
    """

    lattice: Lattice
    size: int
    complex: bool

    @property
    def numbers(self) -> int:
        """Numbers in a chunk, the reserved ones included."""
        return self.lattice.numbers if self.complex else self.lattice.numbers // 2

    @property
    def chunks(self) -> int:
        """Ciphertexts in the vector."""
        return -(-self.size // (self.numbers - RESERVED))

    def chunk_bytes(self, seeded: bool) -> int:
        """Return the bytes of a chunk on the wire."""
        polynomial = self.lattice.degree * ((self.lattice.primes[0] + 7) // 8)
        return SEED + polynomial if seeded else 2 * polynomial

    def bytes(self, seeded: bool) -> int:
        """Return the bytes of all chunks on the wire."""
        return self.chunks * self.chunk_bytes(seeded)


class _Cipher(Protocol):
    """Encrypts and decrypts the slots of one chunk: float64 for CKKS, int64 for BFV."""

    def encrypt(self, slots: np.ndarray) -> Ciphertext: ...

    def decrypt(self, ciphertext: bytes) -> np.ndarray: ...


def compact_works() -> bool:
    """Say whether the installed TenSEAL has the parts of SEAL's own interface that compact ciphertexts need."""
    try:
        sealapi = importlib.import_module("tenseal.sealapi")
    except ImportError:
        return False
    if not hasattr(os, "pread"):  # Windows: no scratch files
        return False
    needed = (
        "BatchEncoder.decode_int64",
        "CKKSEncoder.decode_complex",
        "Encryptor.encrypt_symmetric",
        "SecretKey.load",
    )
    return all(hasattr(getattr(sealapi, name.split(".")[0], None), name.split(".")[1]) for name in needed)


class Encryptor:
    """A client's part in homomorphic encryption: encrypts its numbers, and decrypts the sum of all."""

    def __init__(self, key: ClientKey, plan: Plan, compact: bool | None = None) -> None:
        """Use compact ciphertexts where SEAL's own interface works, or as `compact` says.

        Raise SettingsError where the key was made for other parameters than the plan's.
        """
        self._plan, self._ring, self._version = plan, key.ring, key.version
        self._lattice = _agreed(key, plan)
        self.seeded = compact_works() if compact is None else compact
        self.complex = self.seeded or self._lattice.scheme == "bfv"
        self._cipher: _Cipher = _Compact(key, plan) if self.seeded else _Public(key, plan)
        self._seeds = SeedExpander(
            tenseal.context_from(key.context, n_threads=1), key.ring, plan.scale_bits, key.version
        )

    def form(self, size: int) -> Form:
        """Return how a vector of `size` numbers lies in this encryptor's ciphertexts."""
        return Form(self._lattice, size, self.complex)

    def encrypt(self, values: np.ndarray, examples: int) -> bytes:
        """Encrypt a client's numbers into the body of an upload: chunks one after another, each [seed] coefficients.

        values: int64 [P], multiples of the grid's step as `quantize` gives; examples: n_k, which must be within the
        grid
        Raise ProtectionError where either is outside the grid.
        """
        most = self._plan.grid.most
        if not 0 < examples <= most:
            raise ProtectionError(
                f"{examples:,} training examples cannot be counted on this grid, which ends at {most:,}; take a larger "
                "privacy.protection.range, or a profile with a finer grid"
            )
        if np.abs(values).max(initial=0) > most + 1:
            raise ProtectionError(
                f"a number of {np.abs(values).max():,} steps is outside the grid, which ends at {most:,}"
            )
        form, width = self.form(len(values)), self._ring.width
        step = form.numbers - RESERVED
        chunk = np.zeros(form.numbers, np.int64)
        chunk[:RESERVED] = examples, 1
        pieces: list[Buffer] = []
        for start in range(0, len(values), step):
            piece = values[start : start + step]
            chunk[RESERVED : RESERVED + len(piece)] = piece
            chunk[RESERVED + len(piece) :] = 0
            fresh = self._cipher.encrypt(self._slots(chunk))
            pieces += fresh.seed, trim(fresh.coefficients.reshape(-1), width).data
        return b"".join(pieces)

    def chunks(self, body: Buffer, size: int, seeded: bool) -> Iterator[np.ndarray]:
        """Yield the coefficients of each chunk of a body, as all parties have them: c0 then c1, uint64 [2 N].

        Raise ProtectionError where a coefficient is not below the prime.
        """
        form, width = self.form(size), self._ring.width
        rows = np.frombuffer(body, np.uint8).reshape(form.chunks, form.chunk_bytes(seeded))
        for start in range(0, form.chunks, EXPANDED):
            some = rows[start : start + EXPANDED]
            halves = self._seeds.expand([some[:, :SEED]]) if seeded else repeat(None, len(some))
            for index, (chunk, half) in enumerate(zip(some, halves, strict=True), start):
                coefficients = untrim(chunk[SEED:] if seeded else chunk, width)
                _check_coefficients(coefficients, self._ring, index)
                yield coefficients if half is None else np.concatenate([coefficients, half])

    def decrypt(self, body: Buffer, size: int, examples: int, clients: int) -> np.ndarray:
        """Decrypt the body of an aggregate: the sum of the clients' numbers, int64 [size].

        examples, clients: how many the server announced in the sum
        Raise ProtectionError where it has fewer clients than the plan demands, or where the decrypted numbers cannot be
        that sum.
        """
        plan, form = self._plan, self.form(size)
        if not plan.least <= clients <= plan.clients:
            raise ProtectionError(
                f"an aggregate of {clients:,} clients is not used: {plan.enough} are needed, and at "
                f"most {plan.clients:,} can be added"
            )
        if len(body) != form.bytes(seeded=False):
            raise ProtectionError(
                f"an aggregate of {len(body):,} bytes, where {size:,} numbers take {form.bytes(seeded=False):,}"
            )
        view, length, step = memoryview(body), form.chunk_bytes(seeded=False), form.numbers - RESERVED
        total = np.empty(form.chunks * step, np.int64)
        for index in range(form.chunks):
            coefficients = untrim(view[index * length : (index + 1) * length], self._ring.width)
            _check_coefficients(coefficients, self._ring, index)
            blob = write_ciphertext(coefficients.reshape(2, -1), self._ring, plan.scale_bits, self._version)
            chunk = self._numbers(self._cipher.decrypt(blob))
            if (chunk[0], chunk[1]) != (examples, clients):  # the message tells no decrypted number
                raise ProtectionError(
                    f"the sum does not decrypt: chunk {index} does not hold the {clients:,} clients with {examples:,} examples "
                    "that the server announced. Likely another key, a client or chunk that was lost or added twice, or an "
                    "overflow; compare the key's fingerprint with the server's and the other clients'"
                )
            total[index * step : (index + 1) * step] = chunk[RESERVED:]
        most = plan.grid.largest / plan.grid.step + clients / 2
        if np.abs(total).max(initial=0) > most or total[size:].any():
            raise ProtectionError(
                f"the sum does not decrypt: {clients:,} clients add up to {most:,.0f} steps of the grid at most, and to nothing "
                "after the last number. Likely a damaged chunk, or a client that sent what it must not"
            )
        return total[:size]

    def _slots(self, numbers: np.ndarray) -> np.ndarray:
        """Return the slots of a chunk's numbers [n]: float64 [n], or int64 [n / 2]."""
        if self._lattice.scheme == "ckks":
            return np.asarray(numbers * self._plan.grid.step)
        return np.asarray(numbers[0::2] + (numbers[1::2] << self._lattice.field_bits))

    def _numbers(self, slots: np.ndarray) -> np.ndarray:
        """Return a chunk's numbers, int64 [n], from its slots: the inverse of `_slots`; CKKS rounds to the grid."""
        if self._lattice.scheme == "ckks":
            return np.asarray(np.rint(slots * (1 / self._plan.grid.step)).astype(np.int64))
        bits = self._lattice.field_bits
        half = 1 << (bits - 1)
        numbers = np.empty(2 * len(slots), np.int64)
        numbers[0::2] = ((slots + half) & (2 * half - 1)) - half
        numbers[1::2] = (slots - numbers[0::2]) >> bits
        return numbers


class _Compact:
    """Encryption through SEAL's own interface: complex slots, and fresh ciphertexts with a seed."""

    def __init__(self, key: ClientKey, plan: Plan) -> None:
        try:
            seal = importlib.import_module("tenseal.sealapi")
        except ImportError as error:
            raise ProtectionError(
                f"compact ciphertexts need tenseal.sealapi, which this TenSEAL lacks ({error})"
            ) from None
        self._ring, self._scale, self._scratch, self._seal = key.ring, 2.0**plan.scale_bits, Scratch(), seal
        self._ckks = key.ring.scheme == "ckks"
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS if self._ckks else seal.SCHEME_TYPE.BFV)
        self._scratch.loaded(parameters.load, key.parameters)
        self._context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        secret = seal.SecretKey()
        Scratch().loaded(lambda path: secret.load(self._context, path), key.secret)  # gone from memory with its file
        self._encryptor, self._decryptor = seal.Encryptor(self._context, secret), seal.Decryptor(self._context, secret)
        self._encoder = seal.CKKSEncoder(self._context) if self._ckks else seal.BatchEncoder(self._context)

    def encrypt(self, slots: np.ndarray) -> Ciphertext:
        """Encrypt float64 [N], pairs in complex slots, or int64 [N], into a seeded ciphertext."""
        plain = self._seal.Plaintext()
        if self._ckks:
            self._encoder.encode(slots.view(np.complex128).tolist(), self._scale, plain)
        else:
            self._encoder.encode(slots.tolist(), plain)
        return read_ciphertext(self._scratch.saved(self._encryptor.encrypt_symmetric(plain).save), self._ring)

    def decrypt(self, ciphertext: bytes) -> np.ndarray:
        """Decrypt a ciphertext: float64 [N] of CKKS, int64 [N] of BFV."""
        loaded, plain = self._seal.Ciphertext(), self._seal.Plaintext()
        self._scratch.loaded(lambda path: loaded.load(self._context, path), ciphertext)
        self._decryptor.decrypt(loaded, plain)
        if self._ckks:
            slots = self._encoder.decode_complex(plain)
            return np.fromiter(slots, np.complex128, len(slots)).view(np.float64)
        slots = self._encoder.decode_int64(plain)
        return np.fromiter(slots, np.int64, len(slots))


class _Public:
    """Encryption through TenSEAL's public interface alone."""

    def __init__(self, key: ClientKey, plan: Plan) -> None:
        self._ring, self._scale_bits = key.ring, plan.scale_bits
        self._context = tenseal.context_from(key.context, n_threads=1)

    def encrypt(self, slots: np.ndarray) -> Ciphertext:
        """Encrypt float64 [N / 2], in the real parts of slots, or int64 [N]."""
        if self._ring.scheme == "ckks":
            vector = tenseal.ckks_vector(self._context, slots.tolist(), scale=2.0**self._scale_bits)
        else:
            vector = tenseal.bfv_vector(self._context, slots.tolist())
        return read_ciphertext(read_vector(vector.serialize())[0], self._ring)

    def decrypt(self, ciphertext: bytes) -> np.ndarray:
        """Decrypt a ciphertext: float64 [N / 2] of CKKS, int64 [N] of BFV."""
        if self._ring.scheme == "ckks":
            data = write_vector([ciphertext], self._ring.degree // 2, self._scale_bits)
            return np.array(tenseal.ckks_vector_from(self._context, data).decrypt(), np.float64)
        data = write_vector([ciphertext], self._ring.degree, 0)
        return np.array(tenseal.bfv_vector_from(self._context, data).decrypt(), np.int64)


class Adder:
    """A server's part in homomorphic encryption: adds uploads one by one and keeps only their sum. It holds no secret.

    Coefficients add modulo the data prime, so the sum's bytes do not depend on the order of uploads. The sum is kept
    trimmed, as it travels. Seeds of uploads are collected and expanded `pending` at a time.
    """

    def __init__(self, context: ServerContext, plan: Plan, pending: int = PENDING) -> None:
        """Start an empty sum; raise SettingsError where the context was made for other parameters than the plan's."""
        _agreed(context, plan)
        self._plan, self._ring, self._version = plan, context.ring, context.version
        self._context = tenseal.context_from(context.context, n_threads=1)
        self._message = np.empty(HEADROOM, np.uint8)  # room for a header, then the sum, then room for its proof
        self._sum = np.empty((0, 2, 0), np.uint8)  # [chunks, polynomials, N * width], a view of it
        self._seeds: list[np.ndarray] = []
        self._expander = SeedExpander(self._context, context.ring, plan.scale_bits, context.version)
        self._made, self._pending = False, pending
        self.form: Form | None = None  # of the first upload, which all must share
        self.clients = 0

    def add(self, body: Buffer, form: Form, seeded: bool) -> None:
        """Add an upload as a whole, or refuse it as a whole.

        form, seeded: of the upload, as its header says
        Raise ProtectionError where it does not fit the uploads before it, holds what is no ciphertext, or is one too
        many.
        """
        if self._made:
            raise ProtectionError("the sum was made already: an upload that comes later is not added to it")
        if self.clients >= self._plan.clients:
            raise ProtectionError(
                f"{self.clients:,} clients are added already, the most for this plan ({self._plan.explain()}); take a smaller "
                "federation.cohort"
            )
        if form != (self.form or form):
            raise ProtectionError(f"an upload of another form cannot be added: {form}, and the first was {self.form}")
        if len(body) != form.bytes(seeded):
            raise ProtectionError(
                f"an upload of {len(body):,} bytes, where {form.size:,} numbers take {form.bytes(seeded):,}"
            )
        chunks = np.frombuffer(body, np.uint8).reshape(form.chunks, -1)
        coefficients = chunks[:, SEED:] if seeded else chunks
        for index, chunk in enumerate(coefficients):
            _check_coefficients(untrim(chunk, self._ring.width), self._ring, index)
        if self.form is None:
            self.form = form
            end = HEADROOM + form.bytes(seeded=False)
            room = proof_bytes(self._ring, form.chunks, self._plan.clients)  # no memory until it is written
            self._message = np.zeros(end + room, np.uint8)
            self._sum = self._message[HEADROOM:end].reshape(form.chunks, 2, -1)
        for chunk, total in zip(coefficients, self._sum, strict=True):
            self._accumulate(total[0] if seeded else total.reshape(-1), untrim(chunk, self._ring.width))
        if seeded:
            self._seeds.append(chunks[:, :SEED].copy())
        self.clients += 1
        if len(self._seeds) == self._pending:
            self._expand()

    def total(self) -> memoryview:
        """Return the body of the aggregate: for each chunk both polynomials. Nothing can be added after it."""
        self._expand()
        self._made = True
        return self._sum.reshape(-1).data.toreadonly()

    def message(self) -> np.ndarray:
        """Return `total` with HEADROOM bytes before it, and room for a proof after it, uint8."""
        self.total()
        return self._message

    def _accumulate(self, total: np.ndarray, coefficients: np.ndarray) -> None:
        """Add coefficients, uint64 [n], to trimmed ones in place, modulo the prime."""
        summed = untrim(total, self._ring.width) + coefficients
        total[:] = trim(
            np.minimum(summed, summed - np.uint64(self._ring.prime)), self._ring.width
        )  # a negative difference wraps to a large number

    def _expand(self) -> None:
        """Add the polynomials that the collected seeds stand for."""
        if not self._seeds:
            return
        for start in range(0, len(self._sum), EXPANDED):
            summed = self._expander.expand([seeds[start : start + EXPANDED] for seeds in self._seeds])
            for total, polynomial in zip(self._sum[start:], summed, strict=False):
                self._accumulate(total[1], polynomial)
        self._seeds.clear()


def _agreed(key: ClientKey | ServerContext, plan: Plan) -> Lattice:
    """Return the lattice of a key; raise SettingsError where it is not the plan's."""
    assert plan.lattice is not None, "a plan of secure aggregation has no lattice"
    check_lattice(key.lattice, plan.lattice)
    return key.lattice


def _check_coefficients(coefficients: np.ndarray, ring: Ring, index: int) -> None:
    largest = int(coefficients.max())
    if largest >= ring.prime:
        raise ProtectionError(
            f"chunk {index} is no ciphertext: a coefficient of {largest} is not below the prime {ring.prime}"
        )
