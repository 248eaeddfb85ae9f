"""Authentication of sums of ciphertexts: a linearly homomorphic MAC under a key that all clients share, and no server.

A chunk is a vector c of 2 N numbers modulo the data prime q. A client gives it n tags, q^n >= 2^100, each

    t = <r, c> + p  (mod q)

with r secret and uniform, the same for all chunks of a round, and a pad p of its own, which is used once. Tags add up as
chunks do. Whoever is about to decrypt a sum knows who is in it, computes <r, sum c> and all pads, and compares. A vector
that is not the sum passes with a chance of at most 1 / q^n (Agrawal and Boneh 2009, "Homomorphic MACs: MAC-based
integrity for network coding", section 3; here with one vector of pads for each sender, as a sum has no other
coefficients than 1).

r and the pads are streams of AES-256 in counter mode, under keys that HMAC-SHA-256 derives from the clients' key. The
input of a pad's key has a fixed length: all fields of an upload that decide what its numbers mean, and 16 fresh bytes
of the sender, so that no pad is used twice. It protects from nobody who has the key: a client that helps the server can
forge.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.core.errors import ForgeryError
from fedveil.privacy.fixed_point import Layout, flatten
from fedveil.privacy.homomorphic.seal import Ring
from fedveil.privacy.trust.manifest import UNSIGNED

SECURITY = 100  # bits: a forged sum passes with a chance of at most 2^-100
KEY, NONCE, DIGEST = 32, 16, 32  # bytes
_SENDER = struct.Struct("<IQ16s")
_EXACT = 53  # bits of a whole number that float64 holds
_AT_ONCE = 16  # chunks multiplied together: their limbs stay in the processor's cache


class Sender(NamedTuple):
    """A client in a sum; nonce: of its upload, NONCE bytes."""

    client: int
    examples: int
    nonce: bytes


@dataclass(frozen=True)
class Proof:
    """The proof that ciphertexts are a sum of uploads.

    tags: uint64 [chunks, n]; senders: whose uploads are in it
    """

    tags: np.ndarray
    senders: tuple[Sender, ...]


def count_tags(prime: int) -> int:
    """Return the tags of a chunk: the fewest n with prime^n >= 2^100."""
    number = 1
    while prime**number < 2**SECURITY:
        number += 1
    return number


def proof_bytes(ring: Ring, chunks: int, senders: int) -> int:
    """Return the bytes of a proof on the wire; the one sender of an upload stands in its header: 0."""
    return chunks * count_tags(ring.prime) * ring.width + senders * _SENDER.size


def write_senders(senders: Iterable[Sender]) -> bytes:
    """Write senders as they travel: client, examples, nonce, 28 bytes each."""
    return b"".join(_SENDER.pack(*sender) for sender in senders)


def read_senders(data: bytes | memoryview) -> tuple[Sender, ...]:
    """Read whole senders that `write_senders` wrote."""
    return tuple(Sender(*fields) for fields in _SENDER.iter_unpack(data))


def model_digest(model: Mapping[str, np.ndarray], layout: Layout) -> bytes:
    """Return the SHA-256 of a model in the clear, float32 in the layout's order; of a ciphertext, it is its bytes'."""
    vector = np.ascontiguousarray(flatten({name: model[name] for name, _ in layout.shapes}), "<f4")
    return sha256(layout.digest + vector.tobytes()).digest()


def settings_digest(settings: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a message's settings: text, bytes, numbers, truth values and lists of them, by name."""
    return sha256(_encode([[name, settings[name]] for name in sorted(settings)])).digest()


def _encode(value: Any) -> bytes:
    """Encode a value so that no other has the same bytes: its kind, its length, its content."""
    if isinstance(value, bool):
        kind, content = b"?", b"\1" if value else b"\0"
    elif isinstance(value, int):
        kind, content = b"i", str(int(value)).encode()
    elif isinstance(value, float):
        kind, content = b"f", struct.pack("<d", value)
    elif isinstance(value, str):
        kind, content = b"s", value.encode()
    elif isinstance(value, bytes):
        kind, content = b"b", value
    elif isinstance(value, Sequence):
        kind, content = b"l", b"".join(map(_encode, value))
    else:
        raise TypeError(f"a setting of type {type(value).__name__} has no digest")
    return kind + struct.pack("<Q", len(content)) + content


class Authenticator:
    """Makes and checks tags with the clients' key."""

    def __init__(self, key: bytes, ring: Ring, manifest: bytes = UNSIGNED) -> None:
        """`manifest`: SHA-256 of the run's signed manifest; zeros where it has none."""
        if len(manifest) != DIGEST:
            raise ValueError(f"a manifest's hash of {len(manifest)} bytes, where {DIGEST} were expected")
        self._key, self._prime, self._manifest = key, ring.prime, manifest
        self.tags = count_tags(ring.prime)
        self._limbs = -(-ring.prime.bit_length() // 20)
        self._bits = -(-ring.prime.bit_length() // self._limbs)
        self._segment = min(2 * ring.degree, 2 ** (_EXACT - 2 * self._bits))  # numbers whose products add exactly
        self._length = 2 * ring.degree
        self._made: tuple[bytes, np.ndarray] | None = None  # the newest round's r, for all clients of a process

    def tag(self, chunks: Iterable[np.ndarray], run: bytes, round: int, terms: bytes, sender: Sender) -> np.ndarray:
        """Return the tags of an upload, uint64 [chunks, n].

        chunks: uint64 [2 N] each, below q, c0 before c1; run, round: of the upload
        terms: DIGEST bytes that differ where anything does that all uploads of a sum must share
        """
        products = self.products(chunks, run, round)
        return _add(products, self.pads(len(products), terms, sender), self._prime)

    def check(
        self,
        chunks: Iterable[np.ndarray],
        run: bytes,
        round: int,
        terms: bytes,
        proof: Proof,
        *,
        clients: int,
        examples: int,
        registered: int,
        least: int,
    ) -> None:
        """Raise ForgeryError where the chunks are not the sum of one upload of each of the proof's senders.

        It needs no secret key. clients, examples: of the sum, as its header says; registered: clients that there are
        least: clients that must be in the sum; the others as in `tag`
        """
        senders = proof.senders
        ids = [sender.client for sender in senders]
        if len(set(ids)) != len(ids):
            raise ForgeryError(f"an aggregate that names a client twice, among {len(ids):,}")
        if strangers := [client for client in ids if not 0 <= client < registered]:
            raise ForgeryError(
                f"an aggregate that names client {strangers[0]:,}, and the run's clients are 0 to {registered - 1:,}"
            )
        if len(ids) != clients or sum(sender.examples for sender in senders) != examples:
            raise ForgeryError(
                f"an aggregate of {clients:,} clients with {examples:,} examples that names {len(ids):,} clients with "
                f"{sum(sender.examples for sender in senders):,}"
            )
        if len(ids) < least:
            raise ForgeryError(
                f"an aggregate of {len(ids):,} clients is not used: privacy.protection.min_clients = {least:,} are needed"
            )
        wanted = self.products(chunks, run, round)
        for sender in senders:
            wanted = _add(wanted, self.pads(len(wanted), terms, sender), self._prime)
        if not hmac.compare_digest(wanted.astype("<u8").tobytes(), proof.tags.astype("<u8").tobytes()):
            raise ForgeryError(
                "an aggregate that is not the sum of the uploads that it names, from this run, round, model and settings. "
                "Likely a server that lies, or a client that took part with another model or other settings"
            )

    def products(self, chunks: Iterable[np.ndarray], run: bytes, round: int) -> np.ndarray:
        """Return <r, c> modulo q of each chunk and tag, uint64 [chunks, n]; exact, by products of limbs in float64."""
        matrix = self._matrix(run, round)
        rows: list[np.ndarray] = []
        some: list[np.ndarray] = []
        for chunk in chunks:
            some.append(chunk)
            if len(some) == _AT_ONCE:
                rows.append(self._multiply(np.stack(some), matrix))
                some = []
        if some:
            rows.append(self._multiply(np.stack(some), matrix))
        return np.concatenate(rows) if rows else np.zeros((0, self.tags), np.uint64)

    def pads(self, chunks: int, terms: bytes, sender: Sender) -> np.ndarray:
        """Return the pads of a sender's tags, uint64 [chunks, n]."""
        key = self._derive(b"pads", terms + _SENDER.pack(*sender))
        return _uniform(key, chunks * self.tags, self._prime).reshape(chunks, self.tags)

    def _derive(self, purpose: bytes, about: bytes) -> bytes:
        """Return the key of a stream; `about` has a fixed length for each purpose."""
        return hmac.digest(self._key, b"fedveil mac " + purpose + b"\0" + self._manifest + about, "sha256")

    def _matrix(self, run: bytes, round: int) -> np.ndarray:
        """Return a round's r in limbs, float64 [2 N, n limbs]: the limbs of the first tag, from the lowest, then the next."""
        key = self._derive(b"r", struct.pack("<16sI", run, round))
        if self._made is None or self._made[0] != key:
            numbers = _uniform(key, self.tags * self._length, self._prime).reshape(self.tags, self._length)
            limbs = [limb for row in numbers for limb in self._split(row)]
            self._made = key, np.stack(limbs, axis=1)
        return self._made[1]

    def _split(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Return the limbs of numbers below q, from the lowest, as float64."""
        signed, mask = numbers.view(np.int64), (1 << self._bits) - 1
        last = self._limbs - 1
        return [
            ((signed >> (self._bits * i)) & mask if i < last else signed >> (self._bits * i)).astype(np.float64)
            for i in range(self._limbs)
        ]

    def _multiply(self, chunks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Return the products of some chunks, uint64 [k, 2 N], as `products`."""
        total = np.zeros((len(chunks), self.tags), object)
        for i, limb in enumerate(self._split(chunks)):
            for start in range(0, self._length, self._segment):
                end = start + self._segment
                found = (limb[:, start:end] @ matrix[start:end]).astype(np.int64).astype(object)
                for j in range(self._limbs):
                    total += found[:, j :: self._limbs] << (self._bits * (i + j))
        return np.asarray(total % self._prime, np.uint64)


class Tally:
    """The sum of the proofs of uploads, and the list of their senders: all that a server keeps of them."""

    def __init__(self, ring: Ring) -> None:
        self._prime = ring.prime
        self._tags: np.ndarray | None = None
        self._senders: list[Sender] = []

    def add(self, proof: Proof) -> None:
        """Add the proof of an upload of as many chunks as the others."""
        self._tags = proof.tags if self._tags is None else _add(self._tags, proof.tags, self._prime)
        self._senders += proof.senders

    def proof(self) -> Proof:
        """Return the proof of the sum of at least one upload; its senders in the order of their numbers."""
        assert self._tags is not None
        return Proof(self._tags, tuple(sorted(self._senders)))


def _add(one: np.ndarray, other: np.ndarray, prime: int) -> np.ndarray:
    """Add numbers below a prime of at most 63 bits, modulo it."""
    total = one + other
    return np.asarray(np.minimum(total, total - np.uint64(prime)))  # a negative difference wraps to a large number


def _uniform(key: bytes, size: int, prime: int) -> np.ndarray:
    """Return numbers that are uniform below a prime, uint64 [size], from the stream of a key that is used for nothing else.

    Words of the stream are cut to the prime's bits, and those that are not below it are left out: there is no bias.
    """
    mask, encryptor = (
        np.uint64((1 << prime.bit_length()) - 1),
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor(),
    )
    found = np.zeros(0, np.uint64)
    while len(found) < size:
        words = np.frombuffer(encryptor.update(bytes(8 * (size - len(found) + 16))), "<u8") & mask
        found = np.concatenate([found, words[words < prime]])
    return found[:size]
