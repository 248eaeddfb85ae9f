"""Secure aggregation against those who lie: a server, somebody in between, a client, and bytes that are no message."""

from __future__ import annotations

import copy
import os
import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from helpers.aggregations import Aggregation, identities, numbers, session
from helpers.fuzzing import inputs

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg import streams
from fedveil.privacy.secagg.client import SecAggClient
from fedveil.privacy.secagg.messages import Kind, Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.trust import identity
from fedveil.privacy.trust.identity import Signer, load_signer, new_identity, verify


def listing(session: Session, clients: list[int]) -> bytes:
    return rosters.pack(Kind.SURVIVORS, session, 0, dict.fromkeys(clients, b""))


def collected(session: Session, confirmations: dict[int, bytes]) -> bytes:
    signatures = {u: rosters.unpack(Kind.CONFIRMATION, session, u, blob)[u] for u, blob in confirmations.items()}
    return rosters.pack(Kind.CONFIRMATIONS, session, 0, signatures)


def swapped(play: Aggregation, victim: int, receiver: int) -> tuple[bytes, bytes]:
    """The roster of a client with the server's own keys in place of the victim's, and the server's key for sealing."""
    adverts = rosters.unpack(Kind.ROSTER, play.session, receiver, play.server.roster(receiver))
    sealing, masking = streams.new_key(), streams.new_key()
    keys = streams.public_key(sealing) + streams.public_key(masking)
    adverts[victim] = keys + adverts[victim][rosters.KEYS :]
    return rosters.pack(Kind.ROSTER, play.session, receiver, adverts), sealing


# A lying server


def test_two_lists_of_survivors_for_two_halves_are_refused_by_every_client() -> None:
    play = Aggregation(session(threshold=4, active=True), range(6), numbers(6, 5)).until("adverts", "shares", "vectors")
    with_5, without_5 = listing(play.session, [0, 1, 2, 3, 4, 5]), listing(play.session, [0, 1, 2, 3, 4])
    shown = {0: with_5, 1: with_5, 5: with_5, 2: without_5, 3: without_5, 4: without_5}
    signed = {client: play.maskers[client].confirm(shown[client]) for client in shown}
    for client in shown:
        half = {other: signed[other] for other in shown if shown[other] == shown[client]}
        with pytest.raises(ProtectionError, match=r"3 of the neighbourhood of client . confirmed .* takes 4"):
            play.maskers[client].reveal(shown[client], Revealed(), collected(play.session, half))
        with pytest.raises(ProtectionError, match=r"client \d: it did not sign this list of survivors"):
            play.maskers[client].reveal(shown[client], Revealed(), collected(play.session, signed))
        other = without_5 if shown[client] == with_5 else with_5
        with pytest.raises(ProtectionError, match=r"another list than client . confirmed|itself is not listed"):
            play.maskers[client].reveal(other, Revealed(), collected(play.session, signed))
        with pytest.raises(ProtectionError, match="cannot confirm: it has confirmed"):
            play.maskers[client].confirm(other)


def test_without_signatures_two_halves_do_reveal_both_secrets_which_is_the_limit_of_the_passive_mode() -> None:
    play = Aggregation(session(threshold=4), range(6), numbers(6, 5)).until("adverts", "shares", "vectors")
    kinds = set()
    for client, listed in ((0, [0, 1, 2, 3, 4, 5]), (1, [0, 1, 2, 3, 4])):
        answer = play.maskers[client].reveal(listing(play.session, listed), Revealed())
        kinds.add(rosters.unpack(Kind.REVEALS, play.session, client, answer)[5][:1])
    assert kinds == {rosters.SELF_MASK, rosters.MASK_KEY}


def test_a_swapped_key_is_noticed_where_keys_are_signed_and_the_client_is_named() -> None:
    play = Aggregation(session(threshold=3, active=True), range(4), numbers(4, 5)).until("adverts")
    roster, _ = swapped(play, victim=2, receiver=1)
    with pytest.raises(ProtectionError, match="client 2: its keys are not signed by its registered key"):
        play.maskers[1].share(roster)


def test_a_swapped_key_is_not_noticed_in_the_passive_mode_which_trusts_the_server_with_keys() -> None:
    play = Aggregation(session(threshold=3), range(4), numbers(4, 5)).until("adverts")
    roster, sealing = swapped(play, victim=2, receiver=1)
    sealed = rosters.unpack(Kind.SHARES, play.session, 1, play.maskers[1].share(roster))[2]
    public = rosters.unpack(Kind.ROSTER, play.session, 1, roster)[1][: streams.KEY]
    agreed = streams.agree(streams.agreement(sealing), public, 1)
    assert len(streams.unseal(agreed, play.session.digest, 1, 2, sealed)) == 66


@pytest.mark.parametrize("field", ["round", "attempt"])
def test_signed_keys_of_another_round_or_attempt_are_refused(field: str) -> None:
    play = Aggregation(session(threshold=3, active=True), range(4), numbers(4, 5)).until("adverts")
    fields = {"run": play.session.run, "round": 7, "attempt": 0, "size": 5, "threshold": 3, "least": 3, "active": True}
    earlier = Session(**{**fields, field: 3})
    stale = SecAggClient.begin(earlier, 2, play.signers[2], play.registry).advertise()
    adverts = rosters.unpack(Kind.ROSTER, play.session, 1, play.server.roster(1))
    adverts[2] = rosters.unpack(Kind.ADVERT, earlier, 2, stale)[2]
    with pytest.raises(ProtectionError, match="client 2: its keys are not signed"):
        play.maskers[1].share(rosters.pack(Kind.ROSTER, play.session, 1, adverts))
    with pytest.raises(ProtectionError, match=r"client 2.*from another run, round or attempt"):
        SecAggServer(play.session, play.clients, play.around, play.registry).adverts(2, stale)


def test_a_roster_is_refused_without_the_client_with_a_key_twice_too_short_or_too_long_for_the_threshold() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5)).until("adverts")
    adverts = rosters.unpack(Kind.ROSTER, play.session, 1, play.server.roster(1))
    extra = rosters.unpack(Kind.ADVERT, play.session, 9, SecAggClient.begin(play.session, 9).advertise())
    own = adverts[1]
    for changed, reason in (
        ({0: adverts[0], 2: adverts[2], 3: adverts[3]}, "keys of client 1 are missing or are not those"),
        ({**adverts, 1: own[:32] + os.urandom(32)}, "keys of client 1 are missing or are not those"),
        ({**adverts, 3: adverts[2]}, "clients 2 and 3 show the same key"),
        ({**adverts, 3: adverts[3][:32] + own[32:]}, "clients 1 and 3 show the same key"),
        ({**adverts, 3: adverts[3][:32] * 2}, "clients 3 and 3 show the same key"),
        ({1: own, 2: adverts[2]}, "keys came from 2 of its neighbourhood.*fewer than 3"),
        ({**adverts, **extra}, "threshold of 3 is not more than half of the 6"),
        ({**adverts, 2: adverts[2][:-1]}, "63 bytes about client 2"),
        ({**adverts, 2: bytes(32) + adverts[2][32:]}, "client 2: its public key is no usable X25519 key"),
    ):
        with pytest.raises(ProtectionError, match=reason):
            play.maskers[1].share(rosters.pack(Kind.ROSTER, play.session, 1, changed))
    play.maskers[1].share(rosters.pack(Kind.ROSTER, play.session, 1, adverts))


def test_an_inbox_is_refused_with_too_few_strangers_or_shares_that_are_anothers() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5)).until("adverts", "shares")
    sealed = rosters.unpack(Kind.INBOX, play.session, 1, play.server.inbox(1))
    for changed, reason in (
        ({0: sealed[0]}, "shares came from 2 of its neighbourhood"),
        ({**sealed, 9: sealed[0]}, "client 9 is no neighbour of client 1"),
        ({**sealed, 1: sealed[0]}, "client 1 is no neighbour of client 1"),
        ({**sealed, 2: sealed[3]}, "client 2: its shares for client 1 cannot be read"),
        (
            {**sealed, 2: sealed[2][:-1] + bytes([sealed[2][-1] ^ 1])},
            "client 2: its shares for client 1 cannot be read",
        ),
        ({**sealed, 2: sealed[2][1:]}, "93 bytes about client 2"),
    ):
        with pytest.raises(ProtectionError, match=reason):
            play.maskers[1].receive(rosters.pack(Kind.INBOX, play.session, 1, changed))
    play.maskers[1].receive(rosters.pack(Kind.INBOX, play.session, 1, sealed))


@pytest.mark.parametrize("active", [False, True])
def test_survivors_are_refused_without_the_client_too_few_or_with_one_who_never_shared(active: bool) -> None:
    play = Aggregation(
        session(threshold=4, least=5, active=active), range(7), numbers(7, 5), leaves={6: 1}
    ).until("adverts", "shares", "vectors")  # fmt: skip
    ask = play.maskers[1].confirm if active else (lambda listed: play.maskers[1].reveal(listed, Revealed()))
    for clients, reason in (
        ([0, 2, 3, 4, 5], "client 1 itself is not listed"),
        ([0, 1, 2, 3], "4 clients; a sum of fewer than 5"),
        ([0, 1, 2, 3, 4, 6], "client 6 is listed, but shared nothing with client 1"),
        ([1, 2, 3, 20, 21] if not active else [1, 2, 3, 4, 20], "3 of its neighbourhood|client 20 is not registered"),
    ):
        with pytest.raises(ProtectionError, match=reason):
            ask(listing(play.session, clients))


def test_where_the_server_may_lie_the_neighbourhood_alone_must_be_enough_for_a_sum() -> None:
    # a graph in parts gives a sum a part: a part of three is refused where a sum is to be of five
    play = Aggregation(session(threshold=2, least=5, active=True), range(6), numbers(6, 5))
    play.until("adverts")
    adverts = rosters.unpack(Kind.ROSTER, play.session, 1, play.server.roster(1))
    part = rosters.pack(Kind.ROSTER, play.session, 1, {client: adverts[client] for client in (0, 1, 2)})
    with pytest.raises(ProtectionError, match=r"keys came from 3 of its neighbourhood.*fewer than 5"):
        play.maskers[1].share(part)


def test_whoever_is_not_registered_has_no_part() -> None:
    play = Aggregation(session(threshold=3, active=True), range(4), numbers(4, 5))
    without_2 = {client: key for client, key in play.registry.items() if client != 2}
    server = SecAggServer(play.session, play.clients, play.around, without_2)
    with pytest.raises(ProtectionError, match="client 2, adverts: it is not registered"):
        server.adverts(2, play.maskers[2].advertise())
    play = Aggregation(session(threshold=3, active=True), range(4), numbers(4, 5))
    without_2 = {client: key for client, key in play.registry.items() if client != 2}
    play.maskers[1] = SecAggClient.begin(play.session, 1, play.signers[1], without_2)
    play.until("adverts")
    with pytest.raises(ProtectionError, match="client 2 is not registered with this client"):
        play.maskers[1].share(play.server.roster(1))


# A client that sends rubbish


@pytest.mark.parametrize("active", [False, True])
def test_a_client_that_sends_rubbish_is_named_and_counts_as_dropped_out(active: bool) -> None:
    for stage, send in (("adverts", "adverts"), ("shares", "shares"), ("vectors", "add"), ("reveals", "reveals")):
        play = Aggregation(session(threshold=3, active=active), range(5), numbers(5, 5), leaves={3: -1})
        before = ["adverts", "shares", "vectors", "reveals"]
        stages = before[: before.index(stage)]
        play.leaves = {3: {"adverts": 0, "shares": 1, "vectors": 2, "reveals": 4 if active else 3}[stage]}
        play.until(*stages)
        if stage == "reveals":
            play.until("reveals")
        elif stages:
            play.server.close()
        rubbish = np.zeros(4, np.uint32) if send == "add" else b"rubbish"
        with pytest.raises(ProtectionError, match=f"client 3, {stage}: "):
            getattr(play.server, send)(3, rubbish)
        with pytest.raises(ProtectionError, match=f"client 3, {stage}: it dropped out before"):
            getattr(play.server, send)(3, rubbish)
        assert 3 in play.server.dropped


def test_a_message_twice_out_of_turn_or_from_a_stranger_is_refused() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5))
    adverts = {client: masker.advertise() for client, masker in play.maskers.items()}
    server = play.server
    with pytest.raises(ProtectionError, match="client 9, adverts: it is not in this cohort"):
        server.adverts(9, adverts[0])
    with pytest.raises(ProtectionError, match="client 4, adverts: advert: of client 3, not of client 4"):
        server.adverts(4, adverts[3])
    for client in range(4):
        server.adverts(client, adverts[client])
    with pytest.raises(ProtectionError, match="client 0, adverts: a second message"):
        server.adverts(0, adverts[0])
    assert server.close() == (1, 2, 3)
    with pytest.raises(ProtectionError, match="client 1, vectors: out of turn: the server waits for shares"):
        server.add(1, np.zeros(5, np.uint32))
    with pytest.raises(ProtectionError, match="nothing was revealed: shares came from 0 of 5"):
        server.close()


def test_a_vector_that_was_added_stays_in_the_sum_though_its_client_repeats_it() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5)).until("adverts", "shares", "vectors")
    with pytest.raises(ProtectionError, match="client 2, vectors: a second message"):
        play.server.add(2, play.masked[2])
    play.leaves = {2: 3}
    play.until("reveals")
    assert play.server.total().tolist() == play.sum(range(5)).tolist()


def test_the_server_takes_no_share_of_the_wrong_secret() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5), leaves={4: 2}).until(
        "adverts", "shares", "vectors"
    )
    listed = play.server.survivors()
    answer = play.maskers[0].reveal(listed, Revealed())
    entries = rosters.unpack(Kind.REVEALS, play.session, 0, answer)
    assert {client: entry[:1] for client, entry in entries.items()} == {0: b"b", 1: b"b", 2: b"b", 3: b"b", 4: b"k"}
    entries[1] = rosters.MASK_KEY + entries[1][1:]
    with pytest.raises(ProtectionError, match="client 0, reveals: a share of the wrong secret of client 1"):
        play.server.reveals(0, rosters.pack(Kind.REVEALS, play.session, 0, entries))


def test_a_client_that_shared_another_key_than_it_advertised_is_named() -> None:
    play = Aggregation(session(threshold=3), range(5), numbers(5, 5), leaves={4: 2})
    play.until("adverts")
    liar = play.maskers[4]
    roster = play.server.roster(4)
    liar.share(roster)
    shared = {peer: liar._agreed[peer] for peer in range(4)}
    wrong = {peer: streams.seal(shared[peer], play.session.digest, 4, peer, bytes(65) + b"\x07") for peer in shared}
    for client in range(4):
        play.server.shares(client, play.maskers[client].share(play.server.roster(client)))
    play.server.shares(4, rosters.pack(Kind.SHARES, play.session, 4, wrong))
    play.until("vectors", "reveals")
    with pytest.raises(ProtectionError, match="client 4: it did not share the key that it advertised"):
        play.server.total()


def test_a_client_whose_mask_key_nobody_can_agree_with_is_named_before_a_vector_leaves() -> None:
    play = Aggregation(session(threshold=3), range(4), numbers(4, 5)).until("adverts")
    for client in play.server.close():
        adverts = rosters.unpack(Kind.ROSTER, play.session, client, play.server.roster(client))
        if client != 2:
            adverts[2] = adverts[2][: streams.KEY] + bytes(streams.KEY)
        roster = rosters.pack(Kind.ROSTER, play.session, client, adverts)
        play.server.shares(client, play.maskers[client].share(roster))
    with pytest.raises(ProtectionError, match="client 2: its public key is no usable X25519 key"):
        play.until("vectors")
    assert not play.masked


# Bytes that are no message


def random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 10, 48, 49, 50, 200)))


def mutated(rng: random.Random, message: bytes) -> bytes:
    """A valid message, damaged: bits flipped, cut, lengthened, a part repeated, a number changed."""
    data = bytearray(message)
    place = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data += rng.randbytes(rng.randrange(1, 20))
        case 3:
            data[place:place] = data[place : place + rng.randrange(1, 80)]
        case 4:
            data[place : place + 4] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1)))
        case _:
            data[45:49] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1)))
    return bytes(data)


def stages(active: bool) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """By parser: a valid message, and a reader that starts from the same state every time."""
    signers, registry = identities(range(4))
    if active:  # the quicker kind only
        signers[0] = Signer(ed25519.Ed25519PrivateKey.generate())
        registry[0] = signers[0].public
    now = session(threshold=3, active=active)
    server = SecAggServer(now, range(4), {u: [v for v in range(4) if v != u] for u in range(4)}, registry)
    clients = {u: SecAggClient.begin(now, u, signers[u], registry) for u in range(4)}
    found: dict[str, tuple[bytes, Callable[[bytes], object]]] = {}

    def of_server(name: str, message: bytes) -> None:
        frozen = copy.copy(server)

        def read(data: bytes) -> None:
            fresh = copy.copy(frozen)
            for table in ("dropped", "_answered", "_sealed", "_shares"):
                setattr(fresh, table, copy.copy(getattr(frozen, table)))
            getattr(fresh, name)(1, data)

        for table in ("dropped", "_answered", "_sealed", "_shares"):
            setattr(frozen, table, copy.copy(getattr(server, table)))
        found[f"server.{name}"] = message, read

    def of_client(name: str, message: bytes, *more: object) -> None:
        state = clients[1].save()

        def read(data: bytes) -> None:
            getattr(SecAggClient.load(state, signers[1], registry), name)(data, *more)

        found[f"client.{name}"] = message, read

    adverts = {u: masker.advertise() for u, masker in clients.items()}
    of_server("adverts", adverts[1])
    for u in adverts:
        server.adverts(u, adverts[u])
    of_client("share", server.roster(1))
    shares = {u: masker.share(server.roster(u)) for u, masker in clients.items()}
    of_server("shares", shares[1])
    for u in shares:
        server.shares(u, shares[u])
    of_client("receive", server.inbox(1))
    for u, masker in clients.items():
        masker.receive(server.inbox(u))
        server.add(u, masker.mask(np.zeros(5, np.uint32)))
    listed, signed = server.survivors(), b""
    if active:
        of_client("confirm", listed)
        confirmations = {u: masker.confirm(listed) for u, masker in clients.items()}
        of_server("confirm", confirmations[1])
        for u in confirmations:
            server.confirm(u, confirmations[u])
        signed = server.confirmations()
        state = clients[1].save()
        found["client.reveal with confirmations"] = (
            signed,
            lambda data: SecAggClient.load(state, signers[1], registry).reveal(listed, Revealed(), data),
        )
    of_client("reveal", listed, Revealed(), signed)
    of_server("reveals", clients[1].reveal(listed, Revealed(), signed))
    found["SecAggClient.load"] = clients[1].save(), lambda data: SecAggClient.load(data, signers[1], registry)
    memory = Revealed()
    memory.admit(now, b"")
    found["Revealed.load"] = memory.save(), Revealed.load
    return found


@pytest.mark.fuzz(
    "SecAggServer.adverts", "SecAggServer.shares", "SecAggServer.confirm", "SecAggServer.reveals", "SecAggClient.share", "SecAggClient.receive",
    "SecAggClient.confirm", "SecAggClient.reveal", "SecAggClient.load", "Revealed.load",
)  # fmt: skip
@pytest.mark.parametrize("active", [False, True])
def test_no_bytes_crash_a_parser_and_damaged_messages_are_refused_or_say_the_same(active: bool) -> None:
    rng = random.Random(3)
    for name, (message, read) in stages(active).items():
        read(message)
        for _ in range(inputs(3000)):
            with pytest.raises(ProtectionError):
                read(random_bytes(rng))
        accepted = []
        for _ in range(inputs(3000)):
            damaged = mutated(rng, message)
            if damaged == message:
                continue
            try:
                read(damaged)
            except ProtectionError:
                continue
            accepted.append(damaged)
        # without signatures other keys are as good as those; a share is checked when the secret is put together
        lenient = {"server.reveals", "server.shares"} | (set() if active else {"server.adverts", "client.share"})
        lenient |= {"client.reveal with confirmations"}  # enough of the others' signatures are left
        assert name in lenient or not accepted, (name, len(accepted))


# Keys of identities


def test_a_new_identity_signs_and_its_public_half_verifies(tmp_path) -> None:
    private, public = new_identity()
    path = tmp_path / "client.pem"
    path.write_bytes(private)
    path.chmod(0o600)
    signer = load_signer(path)
    assert signer.public == public
    signature = signer.sign(b"statement")
    assert len(signature) <= identity.SIGNATURE
    assert verify(public, b"statement", signature)
    assert not verify(public, b"another", signature)
    assert not verify(new_identity()[1], b"statement", signature)
    assert not verify(public, b"statement", b"")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_private_key_that_others_can_read_is_refused(tmp_path, mode: int) -> None:
    path = tmp_path / "client.pem"
    path.write_bytes(new_identity()[0])
    path.chmod(mode)
    with pytest.raises(ProtectionError, match=rf"client.pem: others can read this private key \(mode {mode:04o}\)"):
        load_signer(path)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()])
def test_keys_are_read_in_pem_and_openssh(tmp_path, key) -> None:
    formats = serialization.PrivateFormat, serialization.PublicFormat
    for private, encoding, public in (
        (formats[0].PKCS8, serialization.Encoding.PEM, formats[1].SubjectPublicKeyInfo),
        (formats[0].OpenSSH, serialization.Encoding.OpenSSH, formats[1].OpenSSH),
    ):
        path = tmp_path / str(private)
        path.touch(0o600)
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
        signature = load_signer(path).sign(b"statement")
        assert verify(key.public_key().public_bytes(encoding, public), b"statement", signature)


def test_files_that_hold_no_usable_key_are_refused_without_showing_them(tmp_path) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = serialization.PrivateFormat.PKCS8
    plain, locked = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"passphrase")
    pem = serialization.Encoding.PEM
    mine = ec.generate_private_key(ec.SECP384R1())
    small = ec.generate_private_key(ec.SECP256R1())
    for content, reason in (
        (b"", "no private key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nsecret words", "no private key"),
        (new_identity()[1], "no private key"),
        (mine.private_bytes(pem, private, locked), "without a passphrase"),
        (other.private_bytes(pem, private, plain), "neither an ECDSA P-384 key nor an Ed25519 one"),
        (small.private_bytes(pem, private, plain), "neither an ECDSA P-384 key nor an Ed25519 one"),
    ):
        path = tmp_path / "key"
        path.touch(0o600)
        path.write_bytes(content)
        with pytest.raises(ProtectionError, match=reason) as refusal:
            load_signer(path)
        assert "secret words" not in str(refusal.value)
    with pytest.raises(ProtectionError, match="cannot be read: No such file"):
        load_signer(tmp_path / "missing")
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    with pytest.raises(ProtectionError, match="neither ECDSA P-384 nor Ed25519"):
        verify(other.public_key().public_bytes(pem, spki), b"", b"")
    with pytest.raises(ProtectionError, match="neither PEM nor OpenSSH"):
        verify(b"rubbish", b"", b"")
