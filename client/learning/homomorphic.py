"""A client under homomorphic encryption: it decrypts the model that it receives, and encrypts its update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord

from fedveil.client.learning.contribution import Sealed
from fedveil.core.errors import ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import from_arrays, from_sealed
from fedveil.privacy.fixed_point import Layout, Parameters, dequantize, flatten, quantize, unflatten
from fedveil.privacy.homomorphic.keys import fingerprint, load_client
from fedveil.privacy.homomorphic.lattice import Encryptor
from fedveil.privacy.homomorphic.wire import Header, expect, read, write
from fedveil.privacy.plan import Plan, make_plan

log = logging.getLogger("flwr")  # where Flower shows what a node does

Share = tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray] | None]  # weights, and noise: `privacy.defences.share`
Newest = tuple[int, bytes]  # the newest aggregate that a client used: its round and its SHA-256


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

    def __init__(self, experiment: Experiment, layout: Layout, key_file: Path) -> None:
        self.plan: Plan = make_plan(experiment.privacy, experiment.federation.cohort)
        self.layout = layout
        self.key = load_client(key_file)
        log.info("key %s, for %s", fingerprint(self.key.key_id), self.plan.protection)
        self._encryptor = Encryptor(self.key, self.plan)
        self._hashed: tuple[bytes, bytes] = b"", sha256(b"").digest()  # the newest blob, and its SHA-256
        self._opened: tuple[tuple[bytes, bytes, int], Parameters] | None = None
        self._open_seconds = 0.0

    def receive(
        self, record: ArrayRecord, run: bytes, number: int, seen: Newest | None
    ) -> tuple[Parameters, Newest | None]:
        """Return the weights in a record, and the newest aggregate to remember.

        run: 16 bytes that name the run; number: of the round whose model this must be, 0 for the first model
        seen: the newest aggregate used before
        Raise ProtectionError where the aggregate must not be used.
        """
        blob = from_sealed(record, self.plan.protection)
        if blob is None:
            if number > 0 or seen is not None:
                raise ProtectionError(
                    f"the model of round {number} came without {self.plan.protection}; only the first one may, which "
                    f"everybody makes from the seed{'' if seen is None else f', and the newest is of round {seen[0]}'}"
                )
            return from_arrays(record), seen
        newest = number, self._digest(blob)
        if seen is not None and (number < seen[0] or (number == seen[0] and newest != seen)):
            raise ProtectionError(
                f"the server sent a second aggregate of round {number}, or an old one (the newest is of round {seen[0]}); the "
                "difference of two would show the clients that are in one of them alone"
            )
        return self.open(blob, run, number), newest

    def open(self, blob: bytes, run: bytes, number: int) -> Parameters:
        """Return the weights of a round's aggregate; each is decrypted once, however often it is asked for."""
        # keyed by round too: the newest aggregate, sent again for the next round, must fail the check below
        which = self._digest(blob), run, number
        if self._opened is None or self._opened[0] != which:
            started = time.process_time()
            header, body = read(blob, self._expect("aggregate", run, number))
            total = self._encryptor.decrypt(body, header.size, header.examples, header.clients)
            vector = dequantize(total, header.examples, header.reference, self.plan.grid)
            self._opened = which, unflatten(vector, self.layout)
            self._open_seconds += time.process_time() - started
        return self._opened[1]

    def take_open_seconds(self) -> float:
        """Return the processor time of decryption since the last call."""
        seconds, self._open_seconds = self._open_seconds, 0.0
        return seconds

    def seal(self, share: Share, client: int, examples: int, number: int, run: bytes, reference: int) -> Sealed:
        """Encrypt weights and their noise, weighted by examples / reference; raise ProtectionError where that is impossible."""
        started = time.process_time()
        values, clipped = rounded(share, examples, reference, self.plan, self.layout)
        expected = self._expect("upload", run, number, client=client, reference=reference)
        header = replace(expected, seeded=self._encryptor.seeded, examples=examples)
        blob = write(header, self._encryptor.encrypt(values, examples))
        return Sealed(blob, clipped, time.process_time() - started)

    def _digest(self, blob: bytes) -> bytes:
        """Return the SHA-256 of a blob, computed once for all clients of a process, who receive the same one."""
        if self._hashed[0] is not blob:
            self._hashed = blob, sha256(blob).digest()
        return self._hashed[1]

    def _expect(self, kind: Literal["upload", "aggregate"], run: bytes, number: int, **others: int) -> Header:
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
