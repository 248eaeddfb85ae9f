"""Sums of ciphertexts, added as they arrive, by a server that has no key."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from flwr.app import ConfigRecord, Message

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import ARRAYS, CONFIG, REFERENCE, SEALED, WEIGHT
from fedveil.privacy.homomorphic.lattice import Adder, compact_works
from fedveil.privacy.homomorphic.wire import Header, expect, read, write_before
from fedveil.server.exchange import count
from fedveil.server.protection.collector import Collected
from fedveil.server.protection.server_protection import ServerProtection, enough, examples_in, protected_update


class HomomorphicCollector:
    """Adds ciphertexts as they arrive and keeps only their sum."""

    final = True

    def __init__(self, protection: ServerProtection, number: int) -> None:
        assert protection.context is not None
        self._protection, self._number = protection, number
        self._adder = Adder(protection.context, protection.plan)
        self._examples = self._reference = 0
        self._announced: dict[int, int] = {}

    def ask(self, messages: list[Message]) -> list[Message]:
        """Announce the cohort's examples in its messages."""
        self._announced = self._protection.announced(messages)
        self._reference = sum(self._announced.values())
        for message in messages:
            cast(ConfigRecord, message.content[CONFIG])[REFERENCE] = self._reference
        return messages

    def take(self, client: int, reply: Message) -> None:
        """Check the whole upload, add it, and drop it; raise ProtectionError where it does not fit."""
        blob = protected_update(reply, self._protection.plan.protection)
        header, body = read(blob, self._expect("upload", client))
        if header.examples != examples_in(reply, self._announced[client]):
            raise ProtectionError(f"it says {count(reply, WEIGHT):,} examples, and its update {header.examples:,}")
        if header.complex != compact_works():
            raise ProtectionError(
                "its update packs numbers in another way than this server's: one of them lacks SEAL's own interface "
                "(tenseal.sealapi); install the same TenSEAL everywhere"
            )
        self._adder.add(body, header.form, header.seeded)
        self._examples += header.examples
        del reply.content[ARRAYS]

    def finish(self, replies: list[Message]) -> Collected:
        """Return the sum, which is the next model; raise ProtectionError where too few clients are in it."""
        adder = self._adder
        bound = enough(self._protection.plan, adder.clients, self._examples, self._reference)
        assert adder.form is not None
        header = replace(
            self._expect("aggregate"),
            complex=adder.form.complex, clients=adder.clients, examples=self._examples,
        )  # fmt: skip
        model = adder.message()
        write_before(header, model)
        return Collected(sealed={SEALED: model}, bound=bound)

    def _expect(self, kind: Literal["upload", "aggregate"], client: int = 0) -> Header:
        protection = self._protection
        assert protection.context is not None
        return expect(
            kind, protection.plan, protection.context, run=protection.run, round=self._number, layout=protection.layout,
            client=client, reference=self._reference,
        )  # fmt: skip
