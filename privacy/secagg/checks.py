"""The checks that a client of a secure aggregation makes of the server's messages.

Each check raises ProtectionError, naming the client or the number that is wrong. Nothing is sent or kept before it
passes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg import streams
from fedveil.privacy.secagg.messages import Kind, Session
from fedveil.privacy.trust import identity
from fedveil.privacy.trust.identity import Registry


def check_adverts(session: Session, client: int, own: bytes, adverts: Mapping[int, bytes], registry: Registry) -> None:
    """Check a roster: the client's own keys on it, enough members, no key twice, signatures, a threshold above half.

    own: the client's two public keys; adverts: keys and signature by member
    """
    rosters.expect_length(Kind.ROSTER, adverts, rosters.KEYS, rosters.KEYS + identity.SIGNATURE)
    if adverts.get(client, b"")[: rosters.KEYS] != own:
        raise ProtectionError(f"roster: the keys of client {client} are missing or are not those it advertised")
    _expect_quorum(session, client, "keys came from", len(adverts))
    if 2 * session.threshold <= len(adverts):
        raise ProtectionError(
            f"roster: a threshold of {session.threshold} is not more than half of the {len(adverts)} members; "
            "both secrets of a client could be asked of two halves"
        )
    owners: dict[bytes, int] = {}
    for member, advert in adverts.items():
        for key in (advert[: streams.KEY], advert[streams.KEY : rosters.KEYS]):
            if key in owners:
                raise ProtectionError(f"roster: clients {owners[key]} and {member} show the same key")
            owners[key] = member
    for member, advert in adverts.items() if session.active else ():
        statement = rosters.advert_statement(session, member, advert[: rosters.KEYS])
        _check_signature(
            member, statement, advert[rosters.KEYS :], registry, "its keys are not signed by its registered key"
        )


def check_inbox(session: Session, client: int, roster: Mapping[int, bytes], sealed: Mapping[int, bytes]) -> None:
    """Check an inbox: shares of neighbours only, and of enough of them."""
    rosters.expect_length(Kind.INBOX, sealed, rosters.SEALED)
    for member in sealed:
        if member not in roster or member == client:
            raise ProtectionError(f"inbox: client {member} is no neighbour of client {client}")
    _expect_quorum(session, client, "shares came from", len(sealed) + 1)


def check_survivors(
    session: Session,
    client: int,
    roster: Mapping[int, bytes],
    held: Mapping[int, bytes],
    listed: Mapping[int, bytes],
    registry: Registry,
) -> None:
    """Check a list of survivors: the client itself on it, no stranger, enough in all and in its neighbourhood.

    held: by the members whose shares the client has, itself among them. On a sparse graph a client knows only its
    neighbourhood, and, where the session is active, who is registered.
    """
    rosters.expect_length(Kind.SURVIVORS, listed, 0)
    if client not in listed:
        raise ProtectionError(f"survivors: client {client} itself is not listed, though it sent its vector")
    for member in listed:
        if member in roster and member not in held:
            raise ProtectionError(f"survivors: client {member} is listed, but shared nothing with client {client}")
        if session.active and member not in registry:
            raise ProtectionError(f"survivors: client {member} is not registered with client {client}")
    if len(listed) < session.least:
        raise ProtectionError(
            f"survivors: {len(listed)} clients; a sum of fewer than {session.least} (privacy.protection.min_clients, or what distributed "
            "noise is made for) is not unmasked"
        )
    _expect_quorum(session, client, "vectors came from", len(listed.keys() & held.keys()))


def check_confirmations(
    session: Session, client: int, statement: bytes, signatures: Mapping[int, bytes], registry: Registry
) -> None:
    """Check that `threshold` of a neighbourhood saw the same list (Bonawitz et al. 2017, figure 4, round 3).

    statement: what the client itself signed, so that it counts; signatures: by surviving members of its neighbourhood
    """
    agreeing = 1
    for member in sorted(signatures.keys() - {client}):
        if agreeing == session.threshold:
            return
        _check_signature(
            member,
            statement,
            signatures[member],
            registry,
            "it did not sign this list of survivors, or it was shown another model or other settings of this round",
        )
        agreeing += 1
    if agreeing < session.threshold:
        raise ProtectionError(
            f"confirmations: {agreeing} of the neighbourhood of client {client} confirmed its list of survivors, and it "
            f"takes {session.threshold}"
        )


def _expect_quorum(session: Session, client: int, what: str, members: int) -> None:
    if members < session.quorum:
        raise ProtectionError(
            f"client {client}, round {session.round}: {what} {members} of its neighbourhood, itself counted; with fewer than "
            f"{session.quorum} it does not go on"
        )


def _check_signature(member: int, statement: bytes, signature: bytes, registry: Registry, otherwise: str) -> None:
    if member not in registry:
        raise ProtectionError(f"client {member} is not registered with this client")
    if not identity.verify(registry[member], statement, signature):
        raise ProtectionError(
            f"client {member}: {otherwise}; the server, or somebody on the way, shows clients other things"
        )
