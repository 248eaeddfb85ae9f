"""A client under homomorphic encryption: it decrypts the model that it receives, and encrypts its update.

Nothing is decrypted that is not a sum of what the clients of the run sent (`privacy/homomorphic/mac.py`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord

from fedveil.client.learning.contribution import Sealed, Share
from fedveil.core.errors import ForgeryError, ProtectionError
from fedveil.core.wire.messages import from_arrays, from_sealed
from fedveil.privacy.fixed_point import Layout, Parameters, dequantize, flatten, quantize, unflatten
from fedveil.privacy.homomorphic.keys import fingerprint, load_client
from fedveil.privacy.homomorphic.lattice import Encryptor
from fedveil.privacy.homomorphic.mac import NONCE, Authenticator, Proof, model_digest
from fedveil.privacy.homomorphic.wire import Header, expect, read, write
from fedveil.privacy.plan import Plan
from fedveil.privacy.trust.manifest import UNSIGNED

log = logging.getLogger("flwr")  # where Flower shows what a node does

Newest = tuple[int, bytes]  # the newest model that a client used: its round and its SHA-256


@dataclass(frozen=True)
class Terms:
    """What an upload is bound to, besides its own numbers: two uploads of one sum have the same.

    number: of the round; run: 16 bytes that name the run; reference: the examples announced for the cohort
    model, settings: SHA-256 of the model that the client received, and of the round's settings
    """

    number: int
    run: bytes
    reference: int
    model: bytes
    settings: bytes


def vector(weights: Mapping[str, np.ndarray], layout: Layout) -> np.ndarray:
    """Flatten a client's weights to [layout.size], in the layout's order, whatever order the server sent."""
    return flatten({name: weights[name] for name, _ in layout.shapes}, next(iter(weights.values())).dtype.type)


def rounded(share: Share, examples: int, reference: int, plan: Plan, layout: Layout) -> tuple[np.ndarray, int]:
    """Return a client's weights and noise on the plan's grid, and how many weights were clipped: 0 with noise.

    That count would tell of the data what no noise hides.
    Raise ProtectionError where the grid would round the share away, or `quantize` does.
    """
    weights, noise = share
    added = None if noise is None else vector(noise, layout)
    values, clipped = quantize(vector(weights, layout), examples, reference, plan.grid, layout, added)
    plan.check_share(examples, reference)
    return values, clipped if noise is None else 0


class HomomorphicClient:
    """Decryption of aggregates and encryption of updates with the clients' key; one serves all clients of a process."""

    def __init__(self, plan: Plan, clients: int, layout: Layout, key_file: Path, manifest: bytes = UNSIGNED) -> None:
        """`clients`: registered ones, numbered from 0; manifest: SHA-256 of the signed one, zeros where there is none."""
        self.plan, self.layout, self._clients = plan, layout, clients
        self.key = load_client(key_file)
        log.info("key %s, for %s", fingerprint(self.key.key_id), self.plan.protection)
        self._encryptor = Encryptor(self.key, self.plan)
        self._authenticator = Authenticator(self.key.mac, self.key.ring, manifest)
        self._hashed: tuple[object, bytes] = None, b""  # the newest model as received, and its SHA-256
        self._opened: tuple[tuple[bytes, bytes, int], bytes, Parameters] | None = None  # and what its clients trained
        self._open_seconds = 0.0

    def receive(self, record: ArrayRecord, run: bytes, number: int, seen: Newest | None) -> tuple[Parameters, Newest]:
        """Return the weights in a record, and the newest model to remember.

        run: 16 bytes that name the run; number: of the round whose model this must be, 0 for the first model
        seen: the newest model used before
        Raise ForgeryError where an aggregate is no sum of the clients' uploads, and another ProtectionError where it
        must not be used.
        """
        blob = from_sealed(record, self.plan.protection)
        if blob is None:
            if number > 0 or (seen is not None and seen[0] > 0):
                raise ProtectionError(
                    f"the model of round {number} came without {self.plan.protection}; only the first one may, which "
                    f"everybody makes from the seed{'' if seen is None else f', and the newest is of round {seen[0]}'}"
                )
            given = self._first(record)
            newest = 0, self._digest(record, lambda: model_digest(given, self.layout))
        else:
            newest = number, self._digest(blob, lambda: sha256(blob).digest())
        if seen is not None and (number < seen[0] or (number == seen[0] and newest != seen)):
            raise ProtectionError(
                f"the server sent a second aggregate of round {number}, or an old one (the newest is of round {seen[0]}); the "
                "difference of two would show the clients that are in one of them alone"
            )
        if blob is None:
            return given, newest
        return self.open(blob, run, number, seen[1] if seen is not None and seen[0] == number - 1 else None), newest

    def _first(self, record: ArrayRecord) -> Parameters:
        """Return the first model, in the clear; raise ProtectionError where it is of another network."""
        given = from_arrays(record)
        if {name: value.shape for name, value in given.items()} != dict(self.layout.shapes):
            raise ProtectionError("the server sent a first model of another network than its settings describe")
        return given

    def open(self, blob: bytes, run: bytes, number: int, before: bytes | None = None) -> Parameters:
        """Return the weights of a round's aggregate; each is decrypted once, however often it is asked for.

        before: SHA-256 of the model of the round before, where it is known
        Raise ForgeryError where it is no sum of the clients' uploads, before the secret key is used, and another
        ProtectionError where it is of something else or damaged.
        """
        # keyed by round too: the newest aggregate, sent again for the next round, must fail the check below
        which = self._digest(blob, lambda: sha256(blob).digest()), run, number
        if self._opened is None or self._opened[0] != which:
            started = time.process_time()
            header, body, proof = read(blob, self._expect("aggregate", run, number))
            _check_model(header.model, before, number)
            self._authenticator.check(
                self._encryptor.chunks(body, header.size, seeded=False), run, number, header.terms, proof,
                clients=header.clients, examples=header.examples, registered=self._clients, least=self.plan.least,
            )  # fmt: skip
            total = self._encryptor.decrypt(body, header.size, header.examples, header.clients)
            vector = dequantize(total, header.examples, header.reference, self.plan.grid)
            self._opened = which, header.model, unflatten(vector, self.layout)
            self._open_seconds += time.process_time() - started
        _check_model(self._opened[1], before, number)
        return self._opened[2]

    def take_open_seconds(self) -> float:
        """Return the processor time of decryption since the last call."""
        seconds, self._open_seconds = self._open_seconds, 0.0
        return seconds

    def seal(self, share: Share, client: int, examples: int, terms: Terms) -> Sealed:
        """Encrypt weights and their noise, weighted by examples / reference; raise ProtectionError where that is impossible."""
        started = time.process_time()
        values, clipped = rounded(share, examples, terms.reference, self.plan, self.layout)
        expected = self._expect(
            "upload", terms.run, terms.number,
            client=client, reference=terms.reference, model=terms.model, settings=terms.settings,
        )  # fmt: skip
        encryptor = self._encryptor
        header = replace(expected, seeded=encryptor.seeded, examples=examples, nonce=os.urandom(NONCE))
        body = encryptor.encrypt(values, examples)
        tags = self._authenticator.tag(
            encryptor.chunks(body, header.size, header.seeded), terms.run, terms.number, header.terms, header.sender
        )
        blob = write(header, body, Proof(tags, (header.sender,)))
        return Sealed(blob, clipped, time.process_time() - started)

    def _digest(self, received: object, compute: Callable[[], bytes]) -> bytes:
        """Return the SHA-256 of a model, computed once for all clients of a process, who receive the same one."""
        if self._hashed[0] is not received:
            self._hashed = received, compute()
        return self._hashed[1]

    def _expect(self, kind: Literal["upload", "aggregate"], run: bytes, number: int, **others: Any) -> Header:
        if len(run) != 16:
            raise ProtectionError(f"the server's message names its run by {len(run)} bytes, where 16 were expected")
        return expect(
            kind,
            self.plan,
            self.key,
            run=run,
            round=number,
            layout=self.layout,
            complex=self._encryptor.complex,
            **others,
        )


def _check_model(trained: bytes, before: bytes | None, number: int) -> None:
    """Raise ForgeryError where an aggregate's clients trained another model than the one that this client was sent."""
    if before is not None and trained != before:
        raise ForgeryError(
            f"the aggregate of round {number} is of clients that trained another model than the one this client was sent: "
            "the server shows clients different models"
        )
