"""Secure aggregation, the server: it passes messages on, adds masked vectors, and takes the masks off the sum.

Stages follow each other. Each takes one message from every client that is still there; `close` ends it and returns who
goes on. A client whose message is refused, or comes late, counts as dropped out. Where too few are left the attempt is
abandoned before any share is revealed. The server never asks for both secrets of a client, and refuses the wrong one.
Threat models: `fedveil.privacy.secagg.client`. Source: Bonawitz et al. 2017, figure 4; Bell et al. 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg import shamir, streams
from fedveil.privacy.secagg.messages import Kind, Session
from fedveil.privacy.trust import identity
from fedveil.privacy.trust.identity import Registry


class Stage(IntEnum):
    """The messages that the server waits for."""

    ADVERTS = 0
    SHARES = 1
    VECTORS = 2
    CONFIRMATIONS = 3
    REVEALS = 4
    OVER = 5

    def __str__(self) -> str:
        return self.name.lower()


class SecAggServer:
    """The server in one session.

    clients: numbers of the cohort; neighbours: of each, as `graph.neighbours` drew them
    registry: the clients' public keys, needed where the session is active
    """

    def __init__(
        self,
        session: Session,
        clients: Sequence[int],
        neighbours: Mapping[int, Sequence[int]],
        registry: Registry | None = None,
    ) -> None:
        if session.active and registry is None:
            raise ProtectionError("where the server may lie, it takes a registry of the clients' keys")
        self.session = session
        self.stage = Stage.ADVERTS
        self.clients = tuple(sorted(clients))  # clients that were there when the last stage closed
        self.dropped: dict[int, str] = {}  # by client: the stage it dropped out at, and why
        self._registry: Registry = registry if session.active and registry is not None else {}
        self._around = {client: frozenset(neighbours[client]) | {client} for client in clients}
        self._roster: dict[int, tuple[int, ...]] = {}  # a member's place on it is the point of its share
        self._answered: dict[int, bytes] = {}  # in this stage; b"" where the message is not needed again
        self._adverts: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}  # by sender, by receiver
        self._sharing: tuple[int, ...] = ()  # clients whose masks are in the vectors of the others
        self._sum = np.zeros(session.size, np.uint32)
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}  # by whose secret, by point

    def __repr__(self) -> str:
        return (
            f"SecAggServer(round {self.session.round}, attempt {self.session.attempt}, waits for {self.stage}, "
            f"{len(self.clients)} clients)"
        )

    def adverts(self, client: int, blob: bytes) -> None:
        """Take a client's public keys."""
        with self._from(client, Stage.ADVERTS):
            entries = self._own(Kind.ADVERT, client, blob)
            rosters.expect_length(Kind.ADVERT, entries, rosters.KEYS, rosters.KEYS + identity.SIGNATURE)
            advert = entries[client]
            for key in (advert[: streams.KEY], advert[streams.KEY : rosters.KEYS]):
                streams.agree(
                    streams.agreement(streams.new_key()), key, client
                )  # refuse a key that no key can agree with
            statement = rosters.advert_statement(self.session, client, advert[: rosters.KEYS])
            self._check_signature(client, statement, advert[rosters.KEYS :], "not signed by its registered key")
            self._answered[client] = advert

    def roster(self, client: int) -> bytes:
        """Return the keys of a client's neighbourhood, for `SecAggClient.share`; the first call ends the stage before."""
        self._reach(Stage.SHARES, client)
        return rosters.pack(
            Kind.ROSTER, self.session, client, {member: self._adverts[member] for member in self._roster[client]}
        )

    def shares(self, client: int, blob: bytes) -> None:
        """Take a client's sealed shares for its neighbours."""
        with self._from(client, Stage.SHARES):
            sealed = rosters.unpack(Kind.SHARES, self.session, client, blob)
            rosters.expect_length(Kind.SHARES, sealed, rosters.SEALED)
            if sealed.keys() != set(self._roster[client]) - {client}:
                raise ProtectionError(f"shares for {len(sealed)} clients, which are not those on its roster")
            self._sealed[client] = sealed
            self._answered[client] = b""

    def inbox(self, client: int) -> bytes:
        """Return the sealed shares for a client, for `SecAggClient.receive`; the first call ends the stage before."""
        self._reach(Stage.VECTORS, client)
        senders = [member for member in self._roster[client] if member in self._sealed and member != client]
        return rosters.pack(
            Kind.INBOX, self.session, client, {sender: self._sealed[sender][client] for sender in senders}
        )

    def add(self, client: int, masked: np.ndarray) -> None:
        """Add a masked vector, uint32 [size], to the sum; it is not kept."""
        with self._from(client, Stage.VECTORS):
            if not isinstance(masked, np.ndarray) or masked.dtype != np.uint32 or masked.shape != self._sum.shape:
                what = (
                    f"{masked.dtype} {list(masked.shape)}" if isinstance(masked, np.ndarray) else type(masked).__name__
                )
                raise ProtectionError(f"a masked vector is uint32 [{self.session.size}], not {what}")
            np.add(self._sum, masked, out=self._sum)
            self._answered[client] = b""

    def survivors(self) -> bytes:
        """Return whose vectors are in the sum, for `SecAggClient.confirm` and `SecAggClient.reveal`; ends the stage before."""
        self._reach(Stage.CONFIRMATIONS if self.session.active else Stage.REVEALS)
        return rosters.pack(Kind.SURVIVORS, self.session, 0, dict.fromkeys(self.clients, b""))

    def confirm(self, client: int, blob: bytes, shown: bytes = b"") -> None:
        """Take a client's signature of the survivors; `shown`: as in `SecAggClient.mask`."""
        with self._from(client, Stage.CONFIRMATIONS):
            signature = self._own(Kind.CONFIRMATION, client, blob)[client]
            statement = rosters.survivors_statement(self.session, self.clients, shown)
            otherwise = (
                "it signed something else than the list of survivors, or was shown another model or other settings"
            )
            self._check_signature(client, statement, signature, otherwise)
            self._answered[client] = signature

    def confirmations(self) -> bytes:
        """Return the signatures of all, for `SecAggClient.reveal`; ends the stage before."""
        self._reach(Stage.REVEALS)
        return rosters.pack(Kind.CONFIRMATIONS, self.session, 0, self._signatures)

    def reveals(self, client: int, blob: bytes) -> None:
        """Take a client's share of each member of its neighbourhood; the survivors decide of which secret."""
        with self._from(client, Stage.REVEALS):
            entries = rosters.unpack(Kind.REVEALS, self.session, client, blob)
            rosters.expect_length(Kind.REVEALS, entries, 1 + shamir.SHARE)
            if entries.keys() != set(self._roster[client]) & set(self._sharing):
                raise ProtectionError(f"shares of {len(entries)} clients, which are not those that shared with it")
            survivors = set(self.clients)
            for owner, entry in entries.items():
                if entry[:1] != (rosters.SELF_MASK if owner in survivors else rosters.MASK_KEY):
                    raise ProtectionError(f"a share of the wrong secret of client {owner}")
            for owner, entry in entries.items():
                self._shares.setdefault(owner, {})[self._roster[owner].index(client) + 1] = entry[1:]
            self._answered[client] = b""

    def total(self, shown: bytes = b"") -> np.ndarray:
        """Return the sum of the survivors' vectors, uint32 [size], modulo 2^32.

        shown: digest of what the clients were shown, as they have it in `SecAggClient.mask`
        Raise ProtectionError where shares are missing.
        """
        if self.stage != Stage.REVEALS:
            raise ProtectionError(f"there is no sum to unmask: {self._here()} waits for {self.stage}")
        survivors = set(self.clients)
        gone = {client: survivors & self._around[client] for client in self._sharing if client not in survivors}
        needed = [*self.clients, *(client for client, peers in gone.items() if peers)]
        short = [client for client in needed if len(self._shares.get(client, {})) < self.session.threshold]
        if short:
            silent = sorted(survivors - self._answered.keys())
            self._abandon(
                f"the masks of clients {_names(short)} cannot be taken off: it takes {self.session.threshold} shares of "
                f"each, and clients {_names(silent)} revealed none"
            )
        for client in self.clients:
            seed = self._secret(client)
            self._sum -= streams.stream(streams.self_key(seed, self.session.digest, client), self.session.size)
        for client, peers in gone.items():
            if peers:
                self._unmask_pairs(client, peers, shown)
        self.stage = Stage.OVER
        return self._sum

    def close(self) -> tuple[int, ...]:
        """End the stage and return the clients that go on.

        Where too few do, the attempt is abandoned. Raise ProtectionError then.
        """
        if self.stage >= Stage.REVEALS:
            raise ProtectionError(f"{self._here()} waits for {self.stage}: no stage follows")
        silent = [client for client in self.clients if client not in self._answered]
        for client in silent:
            self.dropped.setdefault(client, f"{self.stage}: no answer")
        stayed = [client for client in self.clients if client in self._answered]
        self._expect_enough(stayed)
        if self.stage in (Stage.ADVERTS, Stage.SHARES):
            stayed = self._prune(stayed)
            self._expect_enough(stayed)
        if self.stage == Stage.ADVERTS:
            self._adverts = {client: self._answered[client] for client in stayed}
            self._roster = {client: tuple(sorted(self._around[client] & set(stayed))) for client in stayed}
        elif self.stage == Stage.SHARES:
            self._sharing = tuple(stayed)
            self._sealed = {client: self._sealed[client] for client in stayed}
        elif self.stage == Stage.VECTORS:
            self._expect_neighbourhoods(set(stayed))
            self._sealed = {}
        else:
            self._signatures = dict(self._answered)
        if self.stage != Stage.CONFIRMATIONS:
            self.clients = tuple(stayed)  # clients that are silent later are still in the sum
        self.stage = self._next
        self._answered = {}
        return tuple(stayed)

    @property
    def _next(self) -> Stage:
        return Stage.REVEALS if self.stage == Stage.VECTORS and not self.session.active else Stage(self.stage + 1)

    def _here(self) -> str:
        return f"round {self.session.round}, attempt {self.session.attempt},"

    @contextmanager
    def _from(self, client: int, stage: Stage) -> Iterator[None]:
        """Take a message from a client that may send one; if it is refused, drop the client and name it."""
        try:
            if client in self.dropped:
                raise ProtectionError(f"it dropped out before ({self.dropped[client]})")
            if self.stage != stage:
                raise ProtectionError(f"out of turn: the server waits for {self.stage}")
            if client not in self.clients:
                raise ProtectionError("it is not in this cohort")
            if client in self._answered:
                raise ProtectionError("a second message")
            yield
        except ProtectionError as error:
            if client in self._around:
                self.dropped.setdefault(client, f"{stage}: {error}")
            if self.stage < Stage.VECTORS:
                self._answered.pop(client, None)  # a vector is in the sum, and stays
            raise ProtectionError(f"{self._here()} client {client}, {stage}: {error}") from error

    def _reach(self, stage: Stage, client: int | None = None) -> None:
        """Close the stage before, if it is still open; refuse a message for a client that is not there."""
        if self._next == stage:
            self.close()
        if self.stage != stage:
            raise ProtectionError(f"{self._here()} waits for {self.stage}: nothing of {stage} can be sent")
        if client is not None and client not in self.clients:
            raise ProtectionError(
                f"{self._here()} client {client} is no longer there: {self.dropped.get(client, 'unknown')}"
            )

    def _own(self, kind: Kind, client: int, blob: bytes) -> dict[int, bytes]:
        entries = rosters.unpack(kind, self.session, client, blob)
        if entries.keys() != {client}:
            raise ProtectionError(f"{kind}: about {len(entries)} clients, not about client {client} alone")
        return entries

    def _check_signature(self, client: int, statement: bytes, signature: bytes, otherwise: str) -> None:
        if not self.session.active:
            return
        if client not in self._registry:
            raise ProtectionError("it is not registered")
        if not identity.verify(self._registry[client], statement, signature):
            raise ProtectionError(otherwise)

    def _prune(self, clients: Iterable[int]) -> list[int]:
        """Return the clients without those that would refuse to go on with the rest of their neighbourhood."""
        left = set(clients)
        while lonely := {client for client in left if len(self._around[client] & left) < self.session.quorum}:
            for client in lonely:
                self.dropped[client] = f"{self.stage}: too few of its neighbourhood are left"
            left -= lonely
        return sorted(left)

    def _expect_enough(self, clients: Sequence[int]) -> None:
        least = max(self.session.least, self.session.threshold)
        if len(clients) < least:
            gone = sorted(set(self._around) - set(clients))
            self._abandon(
                f"{self.stage} came from {len(clients)} of {len(self._around)} clients, and it takes {least} "
                f"(missing, counted from 0: {_names(gone)})"
            )

    def _expect_neighbourhoods(self, survivors: set[int]) -> None:
        """Abandon the attempt where masks could not be taken off: before any share is revealed, not after."""
        for client in self._sharing:
            around = len(self._around[client] & survivors)
            least = self.session.quorum if client in survivors else self.session.threshold
            if 0 < around < least:
                gone = sorted((self._around[client] & set(self._sharing)) - survivors)
                self._abandon(
                    f"of the neighbourhood of client {client} {around} sent a vector, and it takes {least} "
                    f"(missing, counted from 0: {_names(gone)})"
                )

    def _abandon(self, why: str) -> None:
        told = "after some shares were revealed" if self._shares else "nothing was revealed"
        self.stage = Stage.OVER
        self._sum = np.zeros(0, np.uint32)
        self._shares = {}
        raise ProtectionError(f"{self._here()} is abandoned, {told}: {why}")

    def _secret(self, client: int) -> bytes:
        try:
            return shamir.combine(self._shares[client], self.session.threshold)
        except ProtectionError as error:
            raise ProtectionError(f"{self._here()} client {client}, reveals: {error}") from error

    def _unmask_pairs(self, client: int, peers: Iterable[int], shown: bytes) -> None:
        """Take off the masks that a client that dropped out exchanged with surviving neighbours."""
        key = self._secret(client)
        if streams.public_key(key) != self._adverts[client][streams.KEY : rosters.KEYS]:
            raise ProtectionError(f"{self._here()} client {client}: it did not share the key that it advertised")
        own, digest = streams.agreement(key), streams.bound(self.session.digest, shown)
        for peer in peers:
            agreed = streams.agree(own, self._adverts[peer][streams.KEY : rosters.KEYS], peer)
            mask = streams.stream(streams.pair_key(agreed, digest, client, peer), self.session.size)
            if peer < client:
                self._sum -= mask
            else:
                self._sum += mask


def _names(clients: Sequence[int]) -> str:
    """Return the numbers of some clients, the first ten where there are more."""
    shown = ", ".join(map(str, clients[:10]))
    return f"{shown} and {len(clients) - 10} more" if len(clients) > 10 else shown or "none"
