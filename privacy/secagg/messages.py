"""The messages between clients and server of a secure aggregation, as bytes.

Every message is a header (kind, session, whose it is) and entries by client, in rising order of their numbers:

    advert          from a client, about itself: its two public keys, and its signature where the server may lie
    roster          to a client: the adverts of its neighbourhood, its own among them
    shares, inbox   from a client to its neighbours, and to a client from them: sealed shares
    survivors       to all: who sent a masked vector; entries are empty
    confirmation    from a client, about itself: its signature of the survivors; `confirmations`: those of all, to all
    reveals         from a client: one byte that says which secret, and its share of that
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import cached_property
from hashlib import sha256

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg import streams
from fedveil.privacy.secagg.shamir import SHARE

HEADER = struct.Struct(">4sB32sQI")  # magic, kind, digest of the session, client, entries
ENTRY = struct.Struct(">QH")  # client, bytes that follow
SESSION = struct.Struct(">16sIIIII?32s")
MAGIC = b"FVS1"
KEYS = 2 * streams.KEY  # bytes of an advert before its signature: the key for sealing, the key for masks
SEALED = streams.NONCE + 2 * SHARE + streams.TAG  # bytes of two sealed shares
SELF_MASK, MASK_KEY = b"b", b"k"  # say which secret a revealed share is of


class Kind(IntEnum):
    """The kind of a message."""

    ADVERT = 1
    ROSTER = 2
    SHARES = 3
    INBOX = 4
    SURVIVORS = 5
    CONFIRMATION = 6
    CONFIRMATIONS = 7
    REVEALS = 8

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Session:
    """One attempt to sum one round's vectors; public, and the same for server and clients.

    A client takes everything but the round and the attempt from its own settings: a threshold that the server may
    choose protects from no server.

    run: 16 random bytes, new for every run; size: numbers in a vector
    threshold: members of a neighbourhood that restore a secret; least: the fewest clients of a sum
    active: the server may lie; keys and survivors are signed
    manifest: SHA-256 of the run's signed manifest; zeros where it has none
    Raise ProtectionError where a number is out of range.
    """

    run: bytes
    round: int
    attempt: int
    size: int
    threshold: int
    least: int
    active: bool = False
    manifest: bytes = bytes(32)

    def __post_init__(self) -> None:
        numbers = (self.round, self.attempt, self.size - 1, self.threshold - 1, self.least - 1)
        if len(self.run) != 16 or len(self.manifest) != 32 or not all(0 <= number < 2**32 - 1 for number in numbers):
            raise ProtectionError(
                f"no session of secure aggregation: run of {len(self.run)} bytes, round {self.round}, attempt "
                f"{self.attempt}, {self.size} numbers, threshold {self.threshold}, at least {self.least} clients"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that depend on every field; every key and every signature depends on them."""
        return sha256(b"fedveil secure aggregation 2\0" + self.save()).digest()

    @property
    def quorum(self) -> int:
        """The fewest members of a neighbourhood, the client itself among them, that a client goes on with.

        A lying server may hand out a graph that falls into parts, each with a sum of its own.
        """
        return max(self.threshold, self.least) if self.active else self.threshold

    def save(self) -> bytes:
        """Return all of it as bytes."""
        return SESSION.pack(*astuple(self))

    @classmethod
    def load(cls, state: bytes) -> Session:
        """Restore the session that `save` returned."""
        return cls(*SESSION.unpack(state))


def pack(kind: Kind, session: Session, whose: int, entries: Mapping[int, bytes]) -> bytes:
    """Write a message; whose: the client that sends or gets it, 0 where it goes to all."""
    return HEADER.pack(MAGIC, kind, session.digest, whose, len(entries)) + pack_entries(entries)


def unpack(kind: Kind, session: Session, whose: int, message: bytes) -> dict[int, bytes]:
    """Read the entries of a message; raise ProtectionError where it is another, of another session, or malformed."""
    if len(message) < HEADER.size:
        raise ProtectionError(f"{kind}: {len(message)} bytes are no message")
    magic, number, digest, owner, count = HEADER.unpack_from(message)
    if magic != MAGIC or number != kind:
        raise ProtectionError(f"{kind}: this is another message, or of another version of FedVeil")
    if digest != session.digest:
        raise ProtectionError(
            f"{kind}: from another run, round or attempt than round {session.round}, attempt {session.attempt}, or with "
            "other settings (numbers in the model, threshold, privacy.protection.min_clients)"
        )
    if owner != whose:
        raise ProtectionError(f"{kind}: of client {owner}, not of client {whose}")
    return unpack_entries(message[HEADER.size :], count, str(kind))


def pack_entries(entries: Mapping[int, bytes]) -> bytes:
    """Write bytes by client, in rising order."""
    return b"".join(ENTRY.pack(client, len(entries[client])) + entries[client] for client in sorted(entries))


def unpack_entries(data: bytes, count: int, what: str) -> dict[int, bytes]:
    """Read exactly `count` entries in rising order of their clients; raise ProtectionError for anything else."""
    entries: dict[int, bytes] = {}
    place, last = 0, -1
    for _ in range(count):
        if place + ENTRY.size > len(data):
            raise ProtectionError(f"{what}: cut off after {len(entries)} of {count} entries")
        client, length = ENTRY.unpack_from(data, place)
        place += ENTRY.size + length
        if place > len(data) or client <= last:
            raise ProtectionError(f"{what}: entry {len(entries) + 1} of {count} is cut off or out of order")
        entries[client] = data[place - length : place]
        last = client
    if place != len(data):
        raise ProtectionError(f"{what}: {len(data) - place} bytes too many")
    return entries


def expect_length(kind: Kind, entries: Mapping[int, bytes], least: int, most: int | None = None) -> None:
    """Raise ProtectionError, naming the client, where an entry is not as long as it must be."""
    most = least if most is None else most
    for client, entry in entries.items():
        if not least <= len(entry) <= most:
            raise ProtectionError(f"{kind}: {len(entry)} bytes about client {client}, where {least} to {most} belong")


def advert_statement(session: Session, client: int, keys: bytes) -> bytes:
    """Return what a client signs to confirm its public keys."""
    return b"fedveil advert\0" + session.digest + struct.pack(">Q", client) + keys


def survivors_statement(session: Session, survivors: Iterable[int], shown: bytes = b"") -> bytes:
    """Return what clients sign to confirm that they were shown these survivors.

    shown: digest of the model and the settings that they were shown, as in `SecAggClient.mask`
    """
    listed = b"".join(struct.pack(">Q", client) for client in sorted(survivors))
    return b"fedveil survivors\0" + streams.bound(session.digest, shown) + sha256(listed).digest()
