"""Secure aggregation, the server: the stages of `fedveil.privacy.secagg.server` on Flower's messages.

First come keys and shares, then the training message, whose reply is the masked vector, then the list of survivors, and
the shares that take the masks off. The server adds masked vectors as they arrive and keeps none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import (
    ARRAYS,
    ATTEMPT,
    BLOB,
    CONFIG,
    CONFIRMATIONS,
    INBOX,
    REFERENCE,
    ROUND,
    RUN,
    from_arrays,
)
from fedveil.privacy.fixed_point import dequantize, flatten, unflatten
from fedveil.privacy.plan import RESERVED, Plan
from fedveil.privacy.secagg.graph import choose_degree, neighbours
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.secagg.vectors import from_ring, read_masked, shown
from fedveil.server.protection.collector import Collected, Opening, contribution
from fedveil.server.protection.noise import NoisySum
from fedveil.server.protection.server_protection import (
    Converse,
    ServerProtection,
    enough,
    examples_in,
    protected_update,
)


class MaskedCollector:
    """One attempt at a round of secure aggregation.

    Every ProtectionError means that nothing was revealed, or that the sum cannot be unmasked.
    """

    def __init__(
        self,
        protection: ServerProtection,
        number: int,
        attempt: int,
        converse: Converse,
        noisy: NoisySum | None = None,
        opening: Opening = lambda _clients: None,
    ) -> None:
        """Start an attempt.

        noisy: what becomes of the sum, where noise is in it, or the server adds it; opening: is told how many clients are
        in the sum, before it is unmasked
        """
        self.final = False
        self._protection, self._number, self._attempt = protection, number, attempt
        self._converse, self._noisy, self._opening = converse, noisy, opening
        privacy = protection.experiment.privacy
        active = protection.registry is not None
        cohort = protection.experiment.federation.cohort
        self._degree, threshold = choose_degree(
            cohort, privacy.protection.drop_outs, privacy.protection.colluders, active
        )
        size = RESERVED + protection.layout.size
        self._session = Session(
            protection.run, number, attempt, size, threshold, protection.plan.least, active, protection.manifest
        )
        self._examples: dict[int, int] = {}
        self._announced: dict[int, int] = {}
        self._reference = 0

    def ask(self, messages: list[Message]) -> list[Message]:
        """Exchange keys and shares; return the training messages of the clients that go on."""
        protection = self._protection
        asked = {m.metadata.dst_node_id - 1: m for m in messages}
        self._announced = protection.announced(messages)
        self._reference = protection.plan.reference(sum(self._announced.values()))
        around = neighbours(sorted(asked), min(self._degree, len(asked) - 1))
        self._unmasker = unmasker = SecAggServer(self._session, sorted(asked), around, protection.registry)
        self._stage("advertise", asked, lambda _: {}, unmasker.adverts)
        self._stage("share", unmasker.close(), lambda client: {BLOB: unmasker.roster(client)}, unmasker.shares)
        stay = unmasker.close()
        for message in messages:
            cast(ConfigRecord, message.content[CONFIG]).update({REFERENCE: self._reference, ATTEMPT: self._attempt})
        self._content = messages[0].content
        return [
            Message(
                RecordDict({**asked[client].content, INBOX: ConfigRecord({BLOB: unmasker.inbox(client)})}),
                dst_node_id=client + 1,
                message_type=MessageType.TRAIN,
            )
            for client in stay
        ]

    def _shown(self) -> bytes:
        """Return the digest of what the clients were given to train on, to which their masks are bound."""
        content = self._content
        settings = dict(cast(ConfigRecord, content[CONFIG]))
        return shown(from_arrays(cast(ArrayRecord, content[ARRAYS])), self._protection.layout, settings)

    def take(self, client: int, reply: Message) -> None:
        """Add a masked update to the sum, and drop it; raise ProtectionError where it does not fit."""
        blob = protected_update(reply, self._protection.plan.protection)
        examples = examples_in(reply, self._announced[client])
        self._unmasker.add(client, read_masked(self._session, client, blob))
        self._examples[client] = examples
        del reply.content[ARRAYS]

    def finish(self, replies: list[Message]) -> Collected:
        """Unmask the sum; return the mean as the contribution of one client with all the examples."""
        protection, unmasker = self._protection, self._unmasker
        stay = unmasker.close()
        examples = sum(self._examples.values())
        bound = enough(protection.plan, len(stay), examples, self._reference)
        survivors = unmasker.survivors()
        brought: dict[str, bytes] = {BLOB: survivors, CONFIRMATIONS: b""}
        shown = self._shown()
        if self._session.active:
            self._stage("confirm", stay, lambda _: brought, partial(unmasker.confirm, shown=shown))
            stay = unmasker.close()
            brought[CONFIRMATIONS] = unmasker.confirmations()
        self._opening(len(stay))
        self.final = True
        self._stage("reveal", stay, lambda _: brought, unmasker.reveals)
        total, grid = unmasker.total(shown), protection.plan.grid
        weights = from_ring(total, examples, len(self._examples), grid)
        # float64: rounding to float32 before the noise would lengthen what the noise must hide
        exact = dequantize(weights, examples, self._reference, grid, np.float64)
        mean = unflatten(exact.astype(np.float32), protection.layout)
        made = mean
        if self._noisy is not None:
            still = on_grid(flatten(self._noisy.given), protection.plan, self._reference)
            made = self._noisy.of_mean(unflatten(exact, protection.layout), len(self._examples), still)
        return Collected([contribution(replies[0], made)], mean=mean, bound=bound)

    def _stage(
        self,
        name: str,
        clients: Iterable[int],
        bring: Callable[[int], dict[str, bytes]],
        take: Callable[[int, bytes], None],
    ) -> None:
        """Ask each client for its message of a stage, and take each reply as it arrives."""
        config = ConfigRecord({RUN: self._protection.run, ROUND: self._number, ATTEMPT: self._attempt})
        messages = [
            Message(
                RecordDict({CONFIG: config, INBOX: ConfigRecord(dict(bring(client)))}),
                dst_node_id=client + 1,
                message_type=f"{MessageType.QUERY}.{name}",
            )
            for client in clients
        ]

        def see(client: int, reply: Message) -> None:
            record = reply.content.get(CONFIG)
            blob = record.get(BLOB) if isinstance(record, ConfigRecord) else None
            if not isinstance(blob, bytes):
                raise ProtectionError(f"its reply carries no message of the stage '{name}'")
            take(client, blob)

        self._converse(messages, name, see)


def on_grid(given: np.ndarray, plan: Plan, reference: int) -> np.ndarray:
    """Return a model as clients send it whose update is zero: within a plan's range and on its grid, float64 [size].

    given: float32 [size], finite; reference: clients of equal weight that were announced
    """
    unit, limit = plan.grid.step * reference, plan.grid.limit
    steps = np.rint(np.clip(given.astype(np.float64), -limit, limit) / unit)
    most = math.floor(limit / unit) if plan.honest else math.inf  # as `dp.distributed.contribution` has it
    return np.asarray(np.clip(steps, -most, most) * unit)
