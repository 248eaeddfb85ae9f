"""A whole secure aggregation in one process, for tests: every client may leave after any stage, and all that is said is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedveil.privacy.secagg.client import SecAggClient, mask_cohort
from fedveil.privacy.secagg.graph import neighbours
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.trust.identity import Registry, Signer

NOTHING, ADVERT, SHARES, VECTOR, CONFIRMATION, ALL = range(6)  # what a client sends last


def session(size: int = 5, threshold: int = 3, least: int = 3, active: bool = False, **changes: int) -> Session:
    """A session of a new run."""
    return Session(os.urandom(16), changes.get("round", 7), changes.get("attempt", 0), size, threshold, least, active)


def identities(clients: Sequence[int]) -> tuple[dict[int, Signer], dict[int, bytes]]:
    """Signers and registry: one key as Flower's nodes have them, the others of the kind that is quick to verify."""
    signers = {client: Signer(ed25519.Ed25519PrivateKey.generate()) for client in clients}
    signers[clients[0]] = Signer(ec.generate_private_key(ec.SECP384R1()))
    return signers, {client: signer.public for client, signer in signers.items()}


@dataclass
class Aggregation:
    """One session with its clients; `until` plays it up to a stage, `total` to the end.

    leaves: what a client sends last, ALL where it is not named; restored: every client is saved and loaded between stages
    """

    session: Session
    clients: Sequence[int]
    values: np.ndarray  # uint32 [clients, size]
    degree: int = 10**9
    leaves: Mapping[int, int] = field(default_factory=dict)
    restored: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        self.signers: dict[int, Signer] = {}
        self.registry: Registry = {}
        if self.session.active:
            self.signers, self.registry = identities(self.clients)
        self.around = neighbours(self.clients, self.degree)
        self.server = SecAggServer(self.session, self.clients, self.around, self.registry)
        self.maskers = {
            client: SecAggClient.begin(self.session, client, self.signers.get(client), self.registry)
            for client in self.clients
        }
        self.memory = {client: Revealed() for client in self.clients}
        self.said: dict[str, dict[int, bytes]] = {}
        self.masked: dict[int, np.ndarray] = {}
        self.listed = b""

    def value(self, client: int) -> np.ndarray:
        return self.values[list(self.clients).index(client)]

    def sum(self, clients: Sequence[int]) -> np.ndarray:
        """The plain sum of some clients' values, uint32 [size]."""
        return sum((self.value(client) for client in clients), np.zeros(self.session.size, np.uint32))

    def still(self, clients: Sequence[int], stage: int) -> list[int]:
        """Those that send what belongs to a stage."""
        if self.restored:
            for client in clients:
                state = self.maskers[client].save()
                self.maskers[client] = SecAggClient.load(state, self.signers.get(client), self.registry)
                self.memory[client] = Revealed.load(self.memory[client].save())
        return [client for client in clients if self.leaves.get(client, ALL) >= stage]

    def adverts(self) -> None:
        self.said["adverts"] = {u: self.maskers[u].advertise() for u in self.still(self.clients, ADVERT)}
        for client, blob in self.said["adverts"].items():
            self.server.adverts(client, blob)

    def shares(self) -> None:
        here = self.server.close()
        self.said["rosters"] = {u: self.server.roster(u) for u in here}
        self.said["shares"] = {u: self.maskers[u].share(self.said["rosters"][u]) for u in self.still(here, SHARES)}
        for client, blob in self.said["shares"].items():
            self.server.shares(client, blob)

    def vectors(self) -> None:
        here = self.server.close()
        self.said["inboxes"] = {u: self.server.inbox(u) for u in here}
        for client in here:
            self.maskers[client].receive(self.said["inboxes"][client])
        senders = self.still(here, VECTOR)
        if self.together:
            rows = np.stack([self.value(u) for u in senders])
            mask_cohort([self.maskers[u] for u in senders], rows)
            self.masked = dict(zip(senders, rows, strict=True))
        else:
            self.masked = {u: self.maskers[u].mask(self.value(u)) for u in senders}
        for client, vector in self.masked.items():
            self.server.add(client, vector)

    def confirmations(self) -> bytes:
        here = self.server.clients
        self.said["confirmations"] = {u: self.maskers[u].confirm(self.listed) for u in self.still(here, CONFIRMATION)}
        for client, blob in self.said["confirmations"].items():
            self.server.confirm(client, blob)
        return self.server.confirmations()

    def reveals(self) -> None:
        self.listed = self.server.survivors()
        signed = self.confirmations() if self.session.active else b""
        here = self.still(self.server.clients, ALL)
        self.said["reveals"] = {u: self.maskers[u].reveal(self.listed, self.memory[u], signed) for u in here}
        for client, blob in self.said["reveals"].items():
            self.server.reveals(client, blob)

    def until(self, *stages: str) -> Aggregation:
        """Play stages by name, in the order given."""
        for stage in stages:
            getattr(self, stage)()
        return self

    def total(self) -> np.ndarray:
        """Play all; the sum as the server has it."""
        return self.until("adverts", "shares", "vectors", "reveals").server.total()


def numbers(clients: int, size: int, seed: int = 0) -> np.ndarray:
    """Any numbers: uint32 [clients, size]."""
    return np.random.default_rng(seed).integers(0, 2**32, (clients, size), dtype=np.uint32)
