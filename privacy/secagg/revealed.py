"""A client's record of the rounds that it helped to unmask; its methods may refuse what a session is about to do."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import sha256
from types import MappingProxyType

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.trust.identity import Registry


class Revealed:
    """The rounds that a client helped to unmask, kept for as long as it trains: one list of survivors a round.

    Two sums of one round for different survivors differ by one client's vector. So the record is stored before shares
    leave.
    """

    _ROUND = struct.Struct(">16sI32s")

    def __init__(self) -> None:
        self._last: dict[bytes, tuple[int, bytes]] = {}  # by run: the latest round, and the digest of its survivors

    def plan(self, members: Iterable[int], registry: Registry) -> None:
        """Admit the members that shares are about to go to, from whom survivors can only drop out."""

    def confirm(self, survivors: Iterable[int], session: Session, registry: Registry) -> None:
        """Admit a list of survivors that is about to be signed."""

    def admit(
        self,
        session: Session,
        statement: bytes,
        survivors: Iterable[int] = (),
        registry: Registry = MappingProxyType({}),
    ) -> None:
        """Record a list of survivors.

        Raise ProtectionError where this round has another list, or a later round is recorded.
        """
        number, fingerprint = self._last.get(session.run, (-1, b""))
        new = sha256(statement).digest()
        if session.round < number or (session.round == number and new != fingerprint):
            raise ProtectionError(
                f"round {session.round} was unmasked already (the latest: round {number}); shares for other survivors or "
                "another attempt would give single vectors away, so none are revealed"
            )
        self._last[session.run] = (session.round, new)

    def save(self) -> bytes:
        """Return all of it as bytes; nothing in it is secret."""
        state = b"".join(self._ROUND.pack(run, *last) for run, last in self._last.items())
        return state + sha256(state).digest()

    @classmethod
    def load(cls, state: bytes) -> Revealed:
        """Restore what `save` returned.

        Raise ProtectionError where it was damaged: a client that forgets would reveal twice.
        """
        rounds = state[:-32]
        if sha256(rounds).digest() != state[-32:] or len(rounds) % cls._ROUND.size:
            raise ProtectionError(
                f"the memory of unmasked rounds is damaged ({len(state)} bytes); put it back, or join another run"
            )
        self = cls()
        for run, number, fingerprint in cls._ROUND.iter_unpack(rounds):
            self._last[run] = (number, fingerprint)
        return self
