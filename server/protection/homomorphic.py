"""Sums of ciphertexts, added as they arrive, by a server that has no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal, cast

from flwr.app import ArrayRecord, ConfigRecord, Message

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import (
    ARRAYS,
    CLIENT,
    CONFIG,
    REFERENCE,
    SEALED,
    WEIGHT,
    from_arrays,
    from_sealed,
)
from fedveil.privacy.homomorphic.lattice import Adder, compact_works
from fedveil.privacy.homomorphic.mac import Tally, model_digest, settings_digest
from fedveil.privacy.homomorphic.wire import Header, expect, read, write_around
from fedveil.server.exchange import count
from fedveil.server.protection.collector import Collected, Opening
from fedveil.server.protection.server_protection import ServerProtection, enough, examples_in, protected_update


class HomomorphicCollector:
    """Adds ciphertexts and their tags as they arrive, and keeps only the sums, and who is in them."""

    final = True

    def __init__(self, protection: ServerProtection, number: int, opening: Opening = lambda _clients: None) -> None:
        """`opening`: is told how many clients are in the sum, which others open."""
        assert protection.context is not None
        self._protection, self._number, self._opening = protection, number, opening
        self._adder, self._tally = Adder(protection.context, protection.plan), Tally(protection.context.ring)
        self._examples = self._reference = 0
        self._announced: dict[int, int] = {}
        self._model = self._settings = b""

    def ask(self, messages: list[Message]) -> list[Message]:
        """Announce the cohort's examples in its messages."""
        self._announced = self._protection.announced(messages)
        self._reference = self._protection.plan.reference(sum(self._announced.values()))
        for message in messages:
            cast(ConfigRecord, message.content[CONFIG])[REFERENCE] = self._reference
        content = messages[0].content
        self._model = self._digest(cast(ArrayRecord, content[ARRAYS]))
        self._settings = settings_digest(_shared(cast(ConfigRecord, content[CONFIG])))
        return messages

    def _digest(self, record: ArrayRecord) -> bytes:
        """Return the SHA-256 of the model that clients were sent, as they compute it."""
        blob = from_sealed(record, self._protection.plan.protection)
        return model_digest(from_arrays(record), self._protection.layout) if blob is None else sha256(blob).digest()

    def take(self, client: int, reply: Message) -> None:
        """Check the whole upload, add it, and drop it; raise ProtectionError where it does not fit."""
        blob = protected_update(reply, self._protection.plan.protection)
        header, body, proof = read(blob, self._expect("upload", client))
        if header.examples != examples_in(reply, self._announced[client]):
            raise ProtectionError(f"it says {count(reply, WEIGHT):,} examples, and its update {header.examples:,}")
        if header.complex != compact_works():
            raise ProtectionError(
                "its update packs numbers in another way than this server's: one of them lacks SEAL's own interface "
                "(tenseal.sealapi); install the same TenSEAL everywhere"
            )
        self._adder.add(body, header.form, header.seeded)
        self._tally.add(proof)
        self._examples += header.examples
        del reply.content[ARRAYS]

    def finish(self, replies: list[Message]) -> Collected:
        """Return the sum, which is the next model; raise ProtectionError where too few clients are in it."""
        adder = self._adder
        bound = enough(self._protection.plan, adder.clients, self._examples, self._reference)
        self._opening(adder.clients)
        assert adder.form is not None
        header = replace(
            self._expect("aggregate"),
            complex=adder.form.complex, clients=adder.clients, examples=self._examples,
        )  # fmt: skip
        return Collected(sealed={SEALED: write_around(header, adder.message(), self._tally.proof())}, bound=bound)

    def _expect(self, kind: Literal["upload", "aggregate"], client: int = 0) -> Header:
        protection = self._protection
        assert protection.context is not None
        return expect(
            kind, protection.plan, protection.context, run=protection.run, round=self._number, layout=protection.layout,
            client=client, reference=self._reference, model=self._model, settings=self._settings,
        )  # fmt: skip


def _shared(config: ConfigRecord) -> Mapping[str, Any]:
    """Return the settings that all clients of a round share."""
    return {key: value for key, value in config.items() if key != CLIENT}
