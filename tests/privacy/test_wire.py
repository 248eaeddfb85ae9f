"""Encrypted messages: what is not the one that is expected is refused by name, and others can read them."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import tenseal
from helpers.fuzzing import parses
from helpers.protected import resealed
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.privacy.fixed_point import Grid, Layout
from fedveil.privacy.homomorphic import wire
from fedveil.privacy.homomorphic.lattice import Adder, Encryptor
from fedveil.privacy.homomorphic.mac import (
    Authenticator,
    Proof,
    Sender,
    Tally,
    count_tags,
    proof_bytes,
    read_senders,
    write_senders,
)

LAYOUT = Layout((("weight", (90, 100)), ("bias", (50,))))
RUN = bytes(range(16))
WAYS = [("ckks", True), ("ckks", False), ("bfv", True), ("bfv", False)]


def expected(p, kind="upload", **changes) -> wire.Header:
    return wire.expect(kind, p.plan, p.client, run=RUN, round=5, layout=LAYOUT, client=7, reference=1000, **changes)


@pytest.fixture(scope="module")
def messages(parties):
    """Parties, three uploads, the aggregate of them, the plain sum, by scheme and way."""
    made: dict[tuple[str, bool], tuple] = {}

    def get(scheme: str, compact: bool):
        if (scheme, compact) not in made:
            p = parties(scheme)
            encryptor, adder = Encryptor(p.client, p.plan, compact), Adder(p.server, p.plan)
            values = np.random.default_rng(0).integers(-100_000, 100_001, (3, LAYOUT.size))
            uploads, tally, authenticator = [], Tally(p.server.ring), Authenticator(p.client.mac, p.client.ring)
            for row in values:
                header = replace(
                    expected(p), seeded=compact, complex=encryptor.complex, examples=100, nonce=os.urandom(16)
                )
                body = encryptor.encrypt(row, 100)
                chunks = encryptor.chunks(body, LAYOUT.size, compact)
                tags = authenticator.tag(chunks, RUN, 5, header.terms, header.sender)
                uploads.append(wire.write(header, body, Proof(tags, (header.sender,))))
                found, body, proof = wire.read(uploads[-1], expected(p))
                adder.add(body, found.form, found.seeded)
                tally.add(proof)
            assert adder.form is not None
            header = replace(expected(p, "aggregate"), complex=adder.form.complex, clients=3, examples=300)
            made[scheme, compact] = p, uploads, wire.write(header, adder.total(), tally.proof()), values.sum(0)
        return made[scheme, compact]

    return get


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_a_message_says_what_was_written(messages, scheme, compact):
    p, uploads, aggregate, total = messages(scheme, compact)
    header, body, proof = wire.read(uploads[0], expected(p))
    assert header == replace(expected(p), seeded=compact, complex=header.complex, examples=100, nonce=header.nonce)
    chunks = header.form.chunks
    assert len(uploads[0]) == 276 + header.form.bytes(compact) + proof_bytes(p.client.ring, chunks, 0)
    assert proof.senders == ((7, 100, header.nonce),)
    assert proof.tags.shape == (chunks, count_tags(p.client.ring.prime))
    encryptor = Encryptor(p.client, p.plan, compact)
    header, body, proof = wire.read(aggregate, expected(p, "aggregate", complex=encryptor.complex))
    assert (header.clients, header.examples, header.reference) == (3, 300, 1000)
    assert len(aggregate) == 276 + header.form.bytes(False) + proof_bytes(p.client.ring, chunks, 3)
    assert [(client, examples) for client, examples, _ in proof.senders] == [(7, 100)] * 3
    assert np.array_equal(encryptor.decrypt(body, header.size, header.examples, header.clients), total)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_plain_tenseal_and_the_documented_offsets_read_an_aggregate(messages, scheme, compact):
    """The recipe for those who leave: a key file, the header's offsets, and TenSEAL."""
    p, _, message, total = messages(scheme, compact)
    degree, prime = struct.unpack_from("<I", message, 12)[0], struct.unpack_from("<Q", message, 16)[0]
    scale_bits, grid_bits, field_bits = struct.unpack_from("<HhI", message, 40)
    version, two, parms_id = message[9:11], message[8] & 2, message[104:136]
    numbers, chunks, length, size = struct.unpack_from("<IIIQ", message, 148)
    width, found = (prime.bit_length() + 7) // 8, np.empty((chunks, numbers))
    context = tenseal.context_from((p.folder / "client-1" / "client.key").read_bytes())
    for chunk in range(chunks):
        body = message[276 + chunk * length : 276 + (chunk + 1) * length]
        data = b"".join(body[at : at + width] + bytes(8 - width) for at in range(0, length, width))
        inner = struct.pack("<HB2sBHQQ", 0xA15E, 16, version, 0, 0, 24 + len(data), len(data) // 8) + data
        shape = parms_id + struct.pack("<BQQQdQ", message[7] == 2, 2, degree, 1, 2.0**scale_bits, 1) + inner
        blob = struct.pack("<HB2sBHQ", 0xA15E, 16, version, 0, 0, 16 + len(shape)) + shape
        slots = degree // 2 if scheme == "ckks" else degree
        vector = b"\x0a\x02" + varint(slots) + b"\x12" + varint(len(blob)) + blob
        if scheme == "ckks":
            vector += b"\x19" + struct.pack("<d", 2.0**scale_bits)
            opened = np.array(tenseal.ckks_vector_from(context, vector).decrypt()) * 2.0**grid_bits
            found[chunk, :: 2 if two else 1] = np.rint(opened)  # plain TenSEAL shows the real half of a slot
        else:
            opened = np.array(tenseal.bfv_vector_from(context, vector).decrypt())
            low = (opened + 2 ** (field_bits - 1)) % 2**field_bits - 2 ** (field_bits - 1)
            found[chunk, 0::2], found[chunk, 1::2] = low, (opened - low) >> field_bits
    shown = 2 if scheme == "ckks" and two else 1
    assert set(found[:, 0]) == {300}
    assert np.array_equal(found[:, 2:].reshape(-1)[:size:shown], total[::shown])


def varint(number: int) -> bytes:
    return bytes([number & 127]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_what_is_not_expected_is_refused_by_name(parties, messages, scheme):
    p, uploads, aggregate, _ = messages(scheme, True)
    other, base = parties(scheme, 1).client, expected(p)
    ring = base.ring
    differing = {
        "round 5, where round 6": replace(base, round=6),
        r"run 0001-\S+, where run ffff-": replace(base, run=b"\xff" * 16),
        "key " + wire.fingerprint(p.client.key_id) + ", where key " + wire.fingerprint(other.key_id): replace(
            base, key_id=other.key_id
        ),
        r"SEAL's version 4\.\d+, where SEAL's version 3\.6": replace(base, version=(3, 6)),
        "degree 4096, where degree 8192": replace(base, ring=replace(ring, degree=8192)),
        f"data prime {ring.prime}, where data prime 97": replace(base, ring=replace(ring, prime=97)),
        "special prime": replace(base, ring=replace(ring, special=97)),
        "plain modulus": replace(base, ring=replace(ring, plain=97)),
        "scale, in bits": replace(base, scale_bits=20),
        r"privacy\.protection\.range 6\.0, where privacy\.protection\.range 2\.0": replace(base, limit=2.0),
        "grid, in bits": replace(base, bits=3),
        "layout of tensors": replace(base, layout=bytes(16)),
        "size 9050, where size 9051": replace(base, size=9051),
        "client 7, where client 8": replace(base, client=8),
        "announced number of examples 1000, where": replace(base, reference=999),
        f"scheme {scheme}, where scheme ": expected(parties("bfv" if scheme == "ckks" else "ckks")),
        "an encrypted upload, where an encrypted aggregate": expected(p, "aggregate"),
    }
    for words, wanted in differing.items():
        with pytest.raises(ProtectionError, match=words):
            wire.read(uploads[0], wanted)
    with pytest.raises(ProtectionError, match="an encrypted aggregate, where an encrypted upload"):
        wire.read(aggregate, base)
    if scheme == "ckks":
        with pytest.raises(ProtectionError, match="two numbers a slot, where packing one number a slot"):
            wire.read(aggregate, expected(p, "aggregate", complex=False))


def test_the_expectation_follows_from_the_plan(parties):
    p = parties("ckks")
    finer = replace(p.plan, grid=Grid(6.0, p.plan.grid.bits + 1))
    names = {"bits", "limit", "scale_bits"}
    first, second = (wire.expect("upload", plan, p.server, run=RUN, round=1, layout=LAYOUT) for plan in (p.plan, finer))
    assert [name for name in names if getattr(first, name) != getattr(second, name)] == ["bits"]
    assert first == wire.expect("upload", p.plan, p.client, run=RUN, round=1, layout=LAYOUT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"examples": 0}, "0 examples in an encrypted upload"),
        ({"examples": 1001}, "1,001 examples in an encrypted upload, of 1,000"),
        ({"examples": 2**63}, "examples in an encrypted upload"),
    ],
)
def test_examples_out_of_range_are_refused(parties, messages, changes, words):
    p, uploads, _, _ = messages("ckks", True)
    header, body, proof = wire.read(uploads[0], expected(p))
    with pytest.raises(ProtectionError, match=words):
        wire.read(wire.write(replace(header, **changes), body, proof), expected(p))


def test_bfv_has_two_numbers_a_slot(messages):
    p, uploads, _, _ = messages("bfv", True)
    header, body, proof = wire.read(uploads[0], expected(p))
    with pytest.raises(ProtectionError, match="in BFV with one number a slot"):
        wire.read(wire.write(replace(header, complex=False), body, proof), expected(p))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": 0}, "0 examples announced"),
        ({"reference": 2**40}, r"examples announced for the cohort, and this grid counts 1 to"),
        ({"clients": 0}, "0 clients"),
        ({"clients": 301}, "301 clients with 300 examples"),
        ({"seeded": True}, "one polynomial and a seed, where ciphertexts of two"),
        ({"complex": False}, "one number a slot"),
    ],
)
def test_an_aggregate_that_cannot_be_is_refused(parties, messages, changes, words):
    p, _, aggregate, _ = messages("bfv", True)
    header, body, proof = wire.read(aggregate, expected(p, "aggregate"))
    with pytest.raises(ProtectionError, match=words):
        wire.read(wire.write(replace(header, **changes), body, proof), expected(p, "aggregate"))


def test_a_header_that_contradicts_itself_is_refused(messages):
    p, uploads, _, _ = messages("bfv", True)
    for place in (8, 11, 44, 104, 148, 152, 156):  # flags, unused, field bits, parms_id, numbers, chunks, bytes a chunk
        head = bytearray(uploads[0][:272])
        head[place] ^= 0x80
        forged = bytes(head) + struct.pack("<I", crc32(uploads[0][276:], crc32(head))) + uploads[0][276:]
        with pytest.raises(ProtectionError, match="contradicts itself"):
            wire.read(forged, expected(p))


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_what_was_cut_or_joined_is_refused(messages, scheme, compact):
    p, uploads, _, _ = messages(scheme, compact)
    whole, wanted = uploads[0], expected(p)
    for damaged in (
        b"",
        whole[:10],
        whole[:275],
        whole[:276],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        whole * 2,
    ):
        with pytest.raises(ProtectionError, match="cut"):
            wire.read(damaged, wanted)


def test_a_flipped_byte_is_refused_wherever_it_is(messages):
    p, uploads, _, _ = messages("ckks", True)
    whole, wanted = bytearray(uploads[0]), expected(p)
    for place in [*range(276), *range(276, len(whole), 97), len(whole) - 1]:
        whole[place] ^= 1 << place % 8
        with pytest.raises(ProtectionError):
            wire.read(whole, wanted)
        whole[place] = uploads[0][place]
    wire.read(whole, wanted)


def test_chunks_in_another_order_or_doubled_are_refused(messages):
    p, uploads, aggregate, _ = messages("bfv", True)
    for message, wanted in ((uploads[0], expected(p)), (aggregate, expected(p, "aggregate"))):
        half = (len(message) - 276) // 2
        head, first, second = message[:276], message[276 : 276 + half], message[276 + half :]
        for body in (second + first, first + first):
            with pytest.raises(ProtectionError, match="checksum"):
                wire.read(head + body, wanted)
        for body in (first, second, first + second + second):
            with pytest.raises(ProtectionError, match="cut or joined"):
                wire.read(head + body, wanted)


@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_a_forged_key_id_shows_on_decryption(parties, messages, scheme):
    """Two keys of equal parameters: TenSEAL adds and opens such ciphertexts without a word."""
    p, _, aggregate, _ = messages(scheme, True)
    stranger = parties(scheme, 1)
    with pytest.raises(ProtectionError, match=f"where key {wire.fingerprint(stranger.client.key_id)}"):
        wire.read(aggregate, expected(stranger, "aggregate"))
    header, body, proof = wire.read(aggregate, expected(p, "aggregate"))
    forged = wire.write(replace(header, key_id=stranger.client.key_id), body, proof)
    header, body, proof = wire.read(forged, expected(stranger, "aggregate"))
    with pytest.raises(ProtectionError, match="another key"):
        Encryptor(stranger.client, stranger.plan).decrypt(body, header.size, header.examples, header.clients)


def test_another_format_is_refused_before_its_sizes_are_used(messages):
    p, uploads, _, _ = messages("bfv", True)
    for version in (0, 1, 0xFFFF):
        with pytest.raises(ProtectionError, match=f"format {version}"):
            wire.read(uploads[0][:4] + struct.pack("<H", version) + uploads[0][6:], expected(p))
    with pytest.raises(ProtectionError, match="not an encrypted message"):
        wire.read(bytes(300), expected(p))


@parses("wire.read", usual=1500)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_refused(messages, data, framed):
    p, _, _, _ = messages("ckks", True)
    if framed:  # a right magic, version, length and checksum, so that the fields are reached
        head = (b"FVHE" + struct.pack("<H", 2) + data).ljust(264, b"\0")[:264] + struct.pack("<Q", len(data))
        data = head + struct.pack("<I", crc32(data, crc32(head))) + data
    with pytest.raises(ProtectionError):
        wire.read(data, expected(p))


@parses("wire.read, damaged headers", usual=1500)
@given(st.lists(st.tuples(st.integers(4, 271), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_with_a_right_checksum_is_refused_or_one_that_only_its_sender_could_tell(messages, changes):
    p, uploads, _, _ = messages("bfv", True)
    head = bytearray(uploads[0][:272])
    for place, value in changes:
        head[place] = value
    forged = bytes(head) + struct.pack("<I", crc32(uploads[0][276:], crc32(head))) + uploads[0][276:]
    try:
        header, _, _ = wire.read(forged, expected(p))
    except ProtectionError:
        return
    assert header == replace(expected(p), seeded=True, examples=header.examples, nonce=header.nonce)
    assert 0 < header.examples <= 1000


def test_the_round_of_a_stored_message_can_be_told_without_a_plan(messages):
    _, uploads, aggregate, _ = messages("bfv", True)
    assert wire.round_of(uploads[0]) == wire.round_of(aggregate) == 5
    assert wire.round_of(b"") == wire.round_of(uploads[0][:139]) == 0


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_a_header_goes_before_a_sum_as_if_they_were_written_together(parties, scheme, compact):
    p = parties(scheme)
    encryptor, adder = Encryptor(p.client, p.plan, compact), Adder(p.server, p.plan)
    for _ in range(3):
        body = encryptor.encrypt(np.arange(LAYOUT.size), 5)
        adder.add(body, encryptor.form(LAYOUT.size), compact)
    header = replace(expected(p, "aggregate"), complex=encryptor.complex, clients=3, examples=15)
    tags = np.arange(header.form.chunks * count_tags(p.server.ring.prime), dtype=np.uint64)
    senders = tuple(Sender(client, 5, bytes([client]) * 16) for client in range(3))
    proof = Proof(tags.reshape(header.form.chunks, -1), senders)
    together = wire.write(header, adder.total(), proof)
    assert wire.write_around(header, adder.message(), proof).tobytes() == together
    assert wire.read(together, replace(expected(p, "aggregate"), complex=encryptor.complex))[2].senders == senders
    with pytest.raises(ProtectionError, match="a header of"):
        wire.write_around(replace(header, size=9_000_000), adder.message(), proof)


def test_a_tag_that_is_no_number_modulo_the_prime_is_refused(messages):
    p, uploads, _, _ = messages("ckks", True)
    header, body, proof = wire.read(uploads[0], expected(p))
    large = Proof(np.full_like(proof.tags, p.client.ring.prime), proof.senders)
    with pytest.raises(ProtectionError, match="a tag that is not below the prime"):
        wire.read(wire.write(header, body, large), expected(p))


def test_an_aggregate_with_a_list_of_another_length_is_refused(messages):
    p, _, aggregate, _ = messages("ckks", True)
    header, body, proof = wire.read(aggregate, expected(p, "aggregate"))
    for senders in (proof.senders[:2], proof.senders * 2, ()):
        with pytest.raises(ProtectionError, match="contradicts itself"):
            wire.read(wire.write(header, body, Proof(proof.tags, senders)), expected(p, "aggregate"))


@parses("mac.read_senders", usual=500)
@given(st.binary(max_size=300).map(lambda data: data[: len(data) // 28 * 28]))
def test_bytes_that_are_whole_senders_are_read_as_they_were_written(data):
    assert write_senders(read_senders(data)) == data


@parses("wire.read, damaged ends", usual=500)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_list_or_tag_with_a_right_checksum_is_refused_or_read_as_it_is(messages, changes):
    p, _, aggregate, _ = messages("bfv", True)
    changed = bytearray(aggregate)
    for place, value in changes:
        changed[-place] = value
    forged = resealed(bytes(changed))
    with contextlib.suppress(ProtectionError):
        header, body, proof = wire.read(forged, expected(p, "aggregate"))
        assert wire.write(header, body, proof) == forged
