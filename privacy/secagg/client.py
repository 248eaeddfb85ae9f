"""Secure aggregation, the client: its vector is noise to the server until it is summed with the others'.

Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", figure 4), on the sparse
graph of Bell et al. 2020. A client adds to its vector, modulo 2^32, a self mask and one mask for each neighbour, which
the neighbour subtracts. It shares the seed of the self mask and the key of the others among its neighbours. For a
client whose vector arrived the neighbours reveal the seed; for one that dropped out, the key. They never reveal both:
with both, a vector that comes late could be read. Nothing here sends the bytes.

Threat models. `active` False: the server follows the protocol and looks at all it gets, and fewer than `threshold` of a
client's neighbours tell it what they know; it learns the sum and who took part. `active` True: the server also lies,
about keys and about who dropped out. Clients sign their keys with registered ones, and reveal nothing before
`threshold` neighbours signed the same list of survivors. So on the complete graph, with 2 threshold > clients +
colluders, the server still learns nothing else. Not protected: what the sum itself tells; a sum whose other members
collude; and the sum from a client that sends rubbish.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading
from fedveil.privacy.secagg import checks as vetting
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg import shamir, streams
from fedveil.privacy.secagg.messages import Kind, Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.trust.identity import Registry, Signer

STATE = struct.Struct(f">4sB{rosters.SESSION.size}sQ32s32s32s32s32sIII")
MAGIC = b"FVM2"


class Stage(IntEnum):
    """The last stage that a client completed."""

    BEGUN = 0
    ADVERTISED = 1
    SHARED = 2
    RECEIVED = 3
    MASKED = 4
    CONFIRMED = 5
    REVEALED = 6

    def __str__(self) -> str:
        return self.name.lower()


class SecAggClient:
    """One client in one session, made by `begin` or `load`. It has one method a stage, in order.

    A message that is refused raises ProtectionError and changes nothing: the client may wait for a right one.
    """

    def __init__(self, session: Session, client: int, signer: Signer | None, registry: Registry | None) -> None:
        if session.active and (signer is None or registry is None):
            raise ProtectionError(
                f"client {client}: where the server may lie, it takes a key to sign with and a registry"
            )
        self.session = session
        self.client = client
        self.stage = Stage.BEGUN
        self._signer = signer
        self._registry: Registry = registry if session.active and registry is not None else {}
        self._sealing = self._masking = self._seed = bytes(streams.KEY)  # two private keys, and the self mask's seed
        self._roster: dict[int, bytes] = {}  # public keys of the neighbourhood
        self._held: dict[int, bytes] = {}  # two shares of each member that shared, its own among them
        self._confirmed = bytes(32)
        self._shown = b""
        self._agreed: dict[int, bytes] = {}  # by peer, the key agreed for sealing: kept to compute it once

    @classmethod
    def begin(
        cls, session: Session, client: int, signer: Signer | None = None, registry: Registry | None = None
    ) -> SecAggClient:
        """Start a client with fresh keys from the operating system.

        signer, registry: needed where the session is active
        """
        self = cls(session, client, signer, registry)
        self._sealing, self._masking, self._seed = streams.new_key(), streams.new_key(), os.urandom(streams.KEY)
        return self

    def __repr__(self) -> str:
        return f"SecAggClient(client {self.client}, round {self.session.round}, attempt {self.session.attempt}, {self.stage})"

    def advertise(self) -> bytes:
        """Return the advert: both public keys, signed where the session is active."""
        self._expect("advertise", Stage.BEGUN)
        keys = self._public
        signature = b""
        if self._signer is not None and self.session.active:
            signature = self._signer.sign(rosters.advert_statement(self.session, self.client, keys))
        self.stage = Stage.ADVERTISED
        return rosters.pack(Kind.ADVERT, self.session, self.client, {self.client: keys + signature})

    def share(self, roster: bytes, revealed: Revealed | None = None) -> bytes:
        """Return sealed shares of both secrets for each neighbour on the roster.

        revealed: the client's record, which may refuse this cohort
        """
        self._expect("share", Stage.ADVERTISED)
        session, client = self.session, self.client
        adverts = rosters.unpack(Kind.ROSTER, session, client, roster)
        vetting.check_adverts(session, client, self._public, adverts, self._registry)
        members = {member: advert[: rosters.KEYS] for member, advert in adverts.items()}
        if revealed is not None and session.active:  # then the graph is complete, and the roster is the whole cohort
            revealed.plan(members, self._registry)
        seeds = shamir.split(self._seed, len(members), session.threshold)
        keys = shamir.split(self._masking, len(members), session.threshold)
        shares = {member: seeds[place] + keys[place] for place, member in enumerate(members)}
        held = {client: shares.pop(client)}
        self._roster = members
        self._agreed = self._agree_with(shares)
        sealed = {
            member: streams.seal(self._agreed[member], session.digest, client, member, secret)
            for member, secret in shares.items()
        }
        self._held = held
        self.stage = Stage.SHARED
        return rosters.pack(Kind.SHARES, session, client, sealed)

    def receive(self, inbox: bytes) -> None:
        """Take the shares of the neighbours; the client exchanges masks with those that sent theirs."""
        self._expect("receive", Stage.SHARED)
        sealed = rosters.unpack(Kind.INBOX, self.session, self.client, inbox)
        vetting.check_inbox(self.session, self.client, self._roster, sealed)
        agreed = self._agreed or self._agree_with(sealed)
        opened = {
            member: streams.unseal(agreed[member], self.session.digest, member, self.client, blob)
            for member, blob in sealed.items()
        }
        self._held |= opened
        self.stage = Stage.RECEIVED

    def mask(self, values: np.ndarray, shown: bytes = b"") -> np.ndarray:
        """Return the client's numbers under all its masks, modulo 2^32, for the server.

        values: uint32 [size]
        shown: digest of what the numbers were made from. The masks of two clients that were shown different things do
        not cancel, so a server learns nothing by showing one client another model than the others
        """
        self._expect("mask", Stage.RECEIVED)
        self._expect_vector(values)
        masked: np.ndarray = values + streams.stream(self._self_key, self.session.size)
        own = streams.agreement(self._masking)
        for peer in self._peers():
            _apply(masked, self.client, peer, self._pair_stream(own, peer, shown))
        self._forget(shown)
        return masked

    def confirm(self, survivors: bytes, revealed: Revealed | None = None) -> bytes:
        """Return the client's signature of the list of survivors; it signs one list in a session.

        revealed: the client's record, which may refuse this list
        """
        self._expect("confirm", Stage.MASKED)
        if self._signer is None or not self.session.active:
            raise ProtectionError(f"client {self.client}: survivors are confirmed only where the session is active")
        listed = self._read_survivors(survivors)
        statement = self._statement(listed)
        if revealed is not None:
            revealed.confirm(listed, self.session, self._registry)
        signature = self._signer.sign(statement)
        self._confirmed = sha256(statement).digest()
        self.stage = Stage.CONFIRMED
        return rosters.pack(Kind.CONFIRMATION, self.session, self.client, {self.client: signature})

    def reveal(self, survivors: bytes, revealed: Revealed, confirmations: bytes = b"") -> bytes:
        """Return one share for each member of the neighbourhood: of a survivor's seed, of a dropped client's key.

        revealed: the client's record, to be stored before the answer leaves; confirmations: where the session is active
        The same list again gives the same answer; another one is refused.
        """
        self._expect("reveal", Stage.CONFIRMED if self.session.active else Stage.MASKED, Stage.REVEALED)
        listed = self._read_survivors(survivors)
        statement = self._statement(listed)
        if self.session.active:
            if sha256(statement).digest() != self._confirmed:
                raise ProtectionError(f"survivors: another list than client {self.client} confirmed")
            signatures = rosters.unpack(Kind.CONFIRMATIONS, self.session, 0, confirmations)
            around = {member: signatures[member] for member in signatures.keys() & self._held.keys() & listed}
            vetting.check_confirmations(self.session, self.client, statement, around, self._registry)
        revealed.admit(self.session, statement, listed, self._registry)
        self.stage = Stage.REVEALED
        cut = shamir.SHARE
        shares = {
            member: rosters.SELF_MASK + held[:cut] if member in listed else rosters.MASK_KEY + held[cut:]
            for member, held in self._held.items()
        }
        return rosters.pack(Kind.REVEALS, self.session, self.client, shares)

    def save(self) -> bytes:
        """Return everything as bytes, secrets included; store it where only this client reads, before a message leaves.

        An older state must not be used again once a message has left: two vectors under one mask differ by no mask.
        """
        state = STATE.pack(
            MAGIC, self.stage, self.session.save(), self.client, self._sealing, self._masking, self._seed,
            self._confirmed, self._shown.ljust(32, b"\0"), len(self._roster), len(self._held), len(self._agreed),
        )  # fmt: skip
        state += b"".join(map(rosters.pack_entries, (self._roster, self._held, self._agreed)))
        return state + sha256(state).digest()

    @classmethod
    def load(cls, state: bytes, signer: Signer | None = None, registry: Registry | None = None) -> SecAggClient:
        """Restore the client that `save` returned; raise ProtectionError where the bytes were damaged."""
        damaged = f"the state of a secure aggregation is damaged ({len(state)} bytes); begin anew"
        content, checksum = state[:-32], state[-32:]
        if len(content) < STATE.size or sha256(content).digest() != checksum or content[:4] != MAGIC:
            raise ProtectionError(damaged)
        with reading(lambda _: ProtectionError(damaged)):
            _, stage, session, client, sealing, masking, seed, confirmed, shown, *counts = STATE.unpack_from(content)
            self = cls(Session.load(session), client, signer, registry)
            self.stage = Stage(stage)
        self._sealing, self._masking, self._seed, self._confirmed = sealing, masking, seed, confirmed
        self._shown = shown if any(shown) else b""
        lengths = rosters.KEYS, 2 * shamir.SHARE, streams.KEY
        sizes = [count * (rosters.ENTRY.size + length) for count, length in zip(counts, lengths, strict=True)]
        kept, start = [], STATE.size
        for count, size in zip(counts, sizes, strict=True):
            kept.append(rosters.unpack_entries(content[start : start + size], count, "state"))
            start += size
        if start != len(content):
            raise ProtectionError(damaged)
        self._roster, self._held, self._agreed = kept
        return self

    @property
    def _public(self) -> bytes:
        return streams.public_key(self._sealing) + streams.public_key(self._masking)

    @property
    def _self_key(self) -> bytes:
        return streams.self_key(self._seed, self.session.digest, self.client)

    def _peers(self) -> Iterator[int]:
        return (member for member in self._held if member != self.client)

    def _mask_key(self, peer: int) -> bytes:
        """Return the public mask key of a peer, as the roster has it."""
        return self._roster[peer][streams.KEY :]

    def _pair_stream(self, own: X25519PrivateKey, peer: int, shown: bytes) -> np.ndarray:
        """Return the mask that the client exchanges with a peer; own: its private mask key."""
        agreed = streams.agree(own, self._mask_key(peer), peer)
        key = streams.pair_key(agreed, streams.bound(self.session.digest, shown), self.client, peer)
        return streams.stream(key, self.session.size)

    def _statement(self, survivors: Iterable[int]) -> bytes:
        """Return what this client signs of some survivors."""
        return rosters.survivors_statement(self.session, survivors, self._shown)

    def _read_survivors(self, survivors: bytes) -> frozenset[int]:
        listed = rosters.unpack(Kind.SURVIVORS, self.session, 0, survivors)
        vetting.check_survivors(self.session, self.client, self._roster, self._held, listed, self._registry)
        return frozenset(listed)

    def _agree_with(self, peers: Iterable[int]) -> dict[int, bytes]:
        """Return the key agreed with each peer, for sealing."""
        own = streams.agreement(self._sealing)
        return {peer: streams.agree(own, self._roster[peer][: streams.KEY], peer) for peer in peers}

    def _forget(self, shown: bytes) -> None:
        """Delete the client's own secrets, so that nothing is masked twice; the neighbours' shares stay.

        shown: what it masked for, to which its list of survivors is bound
        """
        self._shown = shown
        self._sealing = self._masking = self._seed = bytes(streams.KEY)
        self._agreed = {}
        self.stage = Stage.MASKED

    def _expect(self, doing: str, *stages: Stage) -> None:
        if self.stage not in stages:
            raise ProtectionError(
                f"client {self.client} cannot {doing}: it has {self.stage} in round {self.session.round}, attempt "
                f"{self.session.attempt}; that follows only after {' or '.join(map(str, stages))}"
            )

    def _expect_vector(self, values: np.ndarray) -> None:
        if values.dtype != np.uint32 or values.shape != (self.session.size,):
            raise ProtectionError(
                f"client {self.client}: a vector to be masked is uint32 [{self.session.size}], not {values.dtype} "
                f"{list(values.shape)}"
            )


def mask_cohort(maskers: Sequence[SecAggClient], values: np.ndarray, shown: bytes = b"") -> None:
    """Mask the vectors of many clients in place, as `SecAggClient.mask` would bit for bit, but making each pair's mask once.

    values: uint32 [K, size], a row a client; shown: as in `SecAggClient.mask`, the same to all
    Raise ProtectionError where one of them cannot mask; the rows are then of no use.
    """
    for masker, row in zip(maskers, values, strict=True):
        masker._expect("mask", Stage.RECEIVED)
        masker._expect_vector(row)
    place = {(masker.client, masker.session): row for row, masker in enumerate(maskers)}
    if len(place) < len(maskers):
        raise ProtectionError("a client is twice in the cohort to be masked")
    for row, masker in enumerate(maskers):
        values[row] += streams.stream(masker._self_key, masker.session.size)
        own = streams.agreement(masker._masking)
        for peer in masker._peers():
            other = place.get((peer, masker.session))
            both = other is not None and _exchange(masker, maskers[other])
            if both and peer < masker.client:
                continue  # applied together with the peer's row
            mask = masker._pair_stream(own, peer, shown)
            _apply(values[row], masker.client, peer, mask)
            if other is not None and both:
                _apply(values[other], peer, masker.client, mask)
    for masker in maskers:
        masker._forget(shown)


def _exchange(one: SecAggClient, other: SecAggClient) -> bool:
    """Say whether two clients exchange masks and know each other's true keys, which a roster may not have shown."""
    return (
        one.client in other._held
        and one._mask_key(other.client) == other._mask_key(other.client)
        and other._mask_key(one.client) == one._mask_key(one.client)
    )


def _apply(row: np.ndarray, client: int, peer: int, mask: np.ndarray) -> None:
    """Add the mask of two clients to the row of the one with the lower number, or subtract it from the other's.

    Modulo 2^32.
    """
    if client < peer:
        np.add(row, mask, out=row)
    else:
        np.subtract(row, mask, out=row)
