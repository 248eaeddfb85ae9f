"""Random bytes for the parsers that no other file throws them at: each refuses with a ProtectionError, or reads."""

from __future__ import annotations

import contextlib
import json
import struct
from zlib import crc32

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from helpers.aggregations import session
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.privacy.homomorphic import seal, wire
from fedveil.privacy.homomorphic.lattice import Encryptor
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg import shamir, streams
from fedveil.privacy.secagg.messages import Kind
from fedveil.privacy.secagg.vectors import BEFORE, read_masked, write_masked
from fedveil.privacy.trust import identity
from fedveil.privacy.trust import key_folders as parties

SESSION = session(size=20)
BYTES = st.binary(max_size=200)
SIGNERS = [
    identity.Signer(ed25519.Ed25519PrivateKey.generate()),
    identity.Signer(ec.generate_private_key(ec.SECP384R1())),
]
SIGNED = [(signer, signer.sign(b"message")) for signer in SIGNERS]
PEM = identity.new_identity()[0]
REGISTRY = json.dumps({str(client): signer.public.decode() for client, signer in enumerate(SIGNERS)}).encode()
REFUSED = contextlib.suppress(ProtectionError)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of which a part was replaced by others, or by none."""
    place = st.integers(0, len(whole))
    return st.tuples(place, place, st.binary(max_size=20)).map(lambda cut: whole[: cut[0]] + cut[2] + whole[cut[1] :])


@parses("masked.read_masked", usual=1000)
@given(st.binary(max_size=BEFORE + 90), st.booleans())
def test_a_masked_update_is_refused_or_has_the_right_checksum(data, framed):
    if framed:
        data = data.ljust(BEFORE + 4 * SESSION.size, b"\0")[: BEFORE + 4 * SESSION.size]
        head = data[:4] + SESSION.digest + data[36 : BEFORE - 4]
        data = head + struct.pack("<I", crc32(data[BEFORE:], crc32(head))) + data[BEFORE:]
    with REFUSED:
        assert write_masked(SESSION, 3, read_masked(SESSION, 3, data)) == data


def test_a_masked_update_that_is_right_is_read():
    numbers = np.arange(SESSION.size, dtype=np.uint32)
    assert np.array_equal(read_masked(SESSION, 3, write_masked(SESSION, 3, numbers)), numbers)


@parses("rosters.unpack", usual=1000)
@given(st.sampled_from(Kind), BYTES, st.integers(0, 6) | st.integers(0, 2**32 - 1), st.booleans())
def test_a_message_of_secure_aggregation_is_refused_or_is_what_its_entries_give(kind, data, count, framed):
    if framed:
        data = rosters.HEADER.pack(rosters.MAGIC, kind, SESSION.digest, 3, count) + data
    with REFUSED:
        assert rosters.pack(kind, SESSION, 3, rosters.unpack(kind, SESSION, 3, data)) == data


@parses("rosters.unpack, damaged messages", usual=1000)
@given(damaged(rosters.pack(Kind.ROSTER, SESSION, 3, {client: bytes(client) for client in (0, 1, 3, 200)})))
def test_a_damaged_message_is_refused_or_is_what_its_entries_give(data):
    with REFUSED:
        assert rosters.pack(Kind.ROSTER, SESSION, 3, rosters.unpack(Kind.ROSTER, SESSION, 3, data)) == data


@parses("streams.unseal", usual=1000)
@given(BYTES | damaged(streams.seal(bytes(32), SESSION.digest, 1, 2, bytes(2 * shamir.SHARE))))
def test_sealed_shares_that_are_anything_else_are_refused(data):
    with REFUSED:
        assert streams.unseal(bytes(32), SESSION.digest, 1, 2, data) == bytes(2 * shamir.SHARE)


@parses("shamir.combine", usual=1000)
@given(st.dictionaries(st.integers(1, 300), st.binary(min_size=shamir.SHARE, max_size=shamir.SHARE), max_size=5))
def test_shares_give_a_secret_or_none(shares):
    with REFUSED:
        assert len(shamir.combine(shares, 3)) == shamir.SECRET


@parses("identity.verify", usual=1000)
@given(st.sampled_from(SIGNED).flatmap(lambda pair: st.tuples(st.just(pair), BYTES | damaged(pair[1]))))
def test_a_signature_that_was_changed_is_none(given_pair):
    (signer, right), signature = given_pair
    assert identity.verify(signer.public, b"message", signature) == (signature == right)


@parses("identity.verify, public keys", usual=1000)
@given(BYTES | st.sampled_from(SIGNERS).flatmap(lambda signer: damaged(signer.public)))
def test_bytes_that_are_no_public_key_are_refused_or_verify_nothing(public):
    with REFUSED:
        assert not identity.verify(public, b"other message", SIGNED[0][1])


@parses("identity.load_signer", usual=500)
@given(st.data())
def test_a_file_that_is_no_private_key_is_refused(tmp_path_factory, data):
    private = data.draw(BYTES | damaged(PEM) | BYTES.map(lambda some: b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + some))
    path = tmp_path_factory.getbasetemp() / "identity.key"
    path.touch(mode=0o600)
    path.write_bytes(private)
    with REFUSED:
        assert len(identity.load_signer(path).sign(b"message")) <= identity.SIGNATURE


@parses("parties.load_registry", usual=500)
@given(BYTES | damaged(REGISTRY))
def test_a_file_that_is_no_registry_is_refused_or_gives_bytes_by_client(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / parties.REGISTRY).write_bytes(data)
    with REFUSED:
        registry = parties.load_registry(folder)
        assert all(isinstance(client, int) and isinstance(public, bytes) for client, public in registry.items())


@pytest.mark.slow
@parses("Encryptor.decrypt", usual=300)
@given(st.sampled_from(["ckks", "bfv"]), st.integers(0, 2**64 - 1), st.integers(-2, 2), st.booleans())
def test_a_body_that_is_no_sum_is_refused(parties, scheme, seed, more, small):
    p = parties(scheme)
    encryptor = Encryptor(p.client, p.plan)
    length, width = encryptor.form(50).bytes(False) + more, p.client.ring.width
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, p.client.ring.prime, length // width + 1, np.uint64)
    body = seal.trim(numbers, width).tobytes()[:length] if small else rng.bytes(length)
    with pytest.raises(ProtectionError):
        encryptor.decrypt(body, 50, 30, 3)


@parses("wire.round_of", usual=1000)
@given(BYTES)
def test_the_round_of_random_bytes_is_a_number(data):
    assert 0 <= wire.round_of(data) < 2**32
