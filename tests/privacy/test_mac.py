"""Tags of ciphertexts: what the paper's formula gives, number by number, and nothing passes that is no sum of uploads."""

from __future__ import annotations

import hmac
import math
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.errors import ForgeryError
from fedveil.privacy.homomorphic.mac import (
    Authenticator,
    Proof,
    Sender,
    Tally,
    count_tags,
    proof_bytes,
    settings_digest,
)
from fedveil.privacy.homomorphic.seal import Ring

KEY, MANIFEST, RUN, TERMS = bytes(range(32)), b"m" * 32, b"R" * 16, b"t" * 32
PRIMES = {40: 1099511480321, 56: 72057594037641217, 60: 1152921504606830593, 30: 1073692673, 48: 281474976546817}


def ring(bits: int, degree: int = 64) -> Ring:
    return Ring("ckks", degree, PRIMES[bits], 0, 0)


def slow_stream(key: bytes, prime: int):
    """Numbers below a prime: 8 bytes of AES-256-CTR at a time, cut to the prime's bits, the others left out."""
    block_cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    for block in count():
        words = block_cipher.update(block.to_bytes(16, "big"))
        for word in (words[:8], words[8:]):
            number = int.from_bytes(word, "little") % 2 ** prime.bit_length()
            if number < prime:
                yield number


def slow_tags(chunks: list[list[int]], prime: int, round: int, sender: Sender, terms: bytes = TERMS) -> list[list[int]]:
    """t = <r, c> + pad modulo q, in Python's whole numbers, one at a time."""
    tags = math.ceil(100 / math.log2(prime))
    about = RUN + round.to_bytes(4, "little")
    stream = slow_stream(hmac.new(KEY, b"fedveil mac r\0" + MANIFEST + about, "sha256").digest(), prime)
    rows = [[next(stream) for _ in chunks[0]] for _ in range(tags)]
    about = terms + sender.client.to_bytes(4, "little") + sender.examples.to_bytes(8, "little") + sender.nonce
    pads = slow_stream(hmac.new(KEY, b"fedveil mac pads\0" + MANIFEST + about, "sha256").digest(), prime)
    return [
        [(sum(a * b for a, b in zip(row, chunk, strict=True)) + next(pads)) % prime for row in rows] for chunk in chunks
    ]


@given(
    st.sampled_from(sorted(PRIMES)),
    st.integers(1, 20),
    st.integers(1, 2**32 - 1),
    st.sampled_from(["random", "low", "high"]),
    st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_tags_are_those_of_an_independent_implementation(bits, chunks, round, kind, seed) -> None:
    rng, prime = np.random.default_rng(seed), PRIMES[bits]
    numbers = {
        "random": rng.integers(0, prime, (chunks, 128), np.uint64),
        "low": np.zeros((chunks, 128), np.uint64),
        "high": np.full((chunks, 128), prime - 1, np.uint64),
    }[kind]
    sender = Sender(int(rng.integers(2**32)), int(rng.integers(2**63)), rng.bytes(16))
    tags = Authenticator(KEY, ring(bits), MANIFEST).tag(numbers, RUN, round, TERMS, sender)
    assert tags.tolist() == slow_tags(numbers.tolist(), prime, round, sender)


@pytest.mark.parametrize("degree", [2048, 4096, 32768])
@pytest.mark.parametrize("bits", sorted(PRIMES))
def test_products_of_the_largest_numbers_are_exact_at_every_degree(bits, degree) -> None:
    prime = PRIMES[bits]
    authenticator = Authenticator(KEY, ring(bits, degree), MANIFEST)
    numbers = np.full((1, 2 * degree), prime - 1, np.uint64)
    stream = slow_stream(hmac.new(KEY, b"fedveil mac r\0" + MANIFEST + RUN + bytes(4), "sha256").digest(), prime)
    wanted = [sum(next(stream) for _ in range(2 * degree)) * (prime - 1) % prime for _ in range(count_tags(prime))]
    assert authenticator.products(numbers, RUN, 0).tolist() == [wanted]


def test_the_chance_of_a_forger_is_at_most_2_to_the_minus_100_and_tags_take_at_most_32_bytes_a_chunk() -> None:
    for bits, prime in PRIMES.items():
        tags = count_tags(prime)
        assert prime**tags >= 2**100 > prime ** (tags - 1)
        assert proof_bytes(ring(bits), 1, 0) <= 32
    assert [count_tags(PRIMES[bits]) for bits in (30, 40, 48, 56, 60)] == [4, 3, 3, 2, 2]


# --- what passes, and what does not


CLIENTS, CHUNKS = 5, 3


class Play:
    """Five clients, their uploads of one round, and a server that may send what it likes."""

    def __init__(self, bits: int = 40) -> None:
        self.ring = ring(bits)
        self.rng = np.random.default_rng(bits)
        self.authenticator = Authenticator(KEY, self.ring, MANIFEST)
        self.uploads = [self.upload(client) for client in range(CLIENTS)]

    def upload(self, client: int, round: int = 1, terms: bytes = TERMS) -> tuple[np.ndarray, Proof]:
        chunks = self.rng.integers(0, self.ring.prime, (CHUNKS, 128), np.uint64)
        sender = Sender(client, 10 + client, self.rng.bytes(16))
        return chunks, Proof(self.authenticator.tag(chunks, RUN, round, terms, sender), (sender,))

    def sum(self, uploads) -> tuple[np.ndarray, Proof]:
        tally, total = Tally(self.ring), np.zeros((CHUNKS, 128), object)
        for chunks, proof in uploads:
            tally.add(proof)
            total += chunks.astype(object)
        return (total % self.ring.prime).astype(np.uint64), tally.proof()

    def check(self, chunks: np.ndarray, proof: Proof, **changes) -> None:
        about = {
            "clients": len(proof.senders), "examples": sum(sender.examples for sender in proof.senders),
            "registered": CLIENTS, "least": 3, "round": 1, "terms": TERMS, "run": RUN,
        } | changes  # fmt: skip
        self.authenticator.check(chunks, about.pop("run"), about.pop("round"), about.pop("terms"), proof, **about)


@pytest.fixture(params=[40, 56])
def play(request) -> Play:
    return Play(request.param)


def test_every_true_sum_of_enough_clients_passes(play) -> None:
    for some in (play.uploads, play.uploads[:3], play.uploads[::-2]):
        play.check(*play.sum(some))


def refused(play: Play, chunks: np.ndarray, proof: Proof, said: str = "is not the sum", **changes) -> None:
    with pytest.raises(ForgeryError, match=said):
        play.check(chunks, proof, **changes)


def test_a_changed_number_is_caught_wherever_it_is(play) -> None:
    total, proof = play.sum(play.uploads)
    for chunk, place in ((0, 0), (1, 64), (2, 127)):
        for bit in (0, 20, 39):
            changed = total.copy()
            changed[chunk, place] = (int(changed[chunk, place]) ^ 1 << bit) % play.ring.prime
            if changed[chunk, place] != total[chunk, place]:
                refused(play, changed, proof)
    refused(play, np.roll(total, 1, axis=0), proof)
    refused(play, total[:2], proof)


def test_a_changed_tag_or_sender_is_caught(play) -> None:
    total, proof = play.sum(play.uploads)
    for place in np.ndindex(proof.tags.shape):
        tags = proof.tags.copy()
        tags[place] ^= 1
        refused(play, total, Proof(tags, proof.senders))
    first, *others = proof.senders
    for changed in (first._replace(nonce=bytes(16)), first._replace(nonce=first.nonce[:-1] + b"\xff")):
        refused(play, total, Proof(proof.tags, (changed, *others)))
    moved = first._replace(examples=first.examples + 1), others[0]._replace(examples=others[0].examples - 1)
    refused(play, total, Proof(proof.tags, (*moved, *others[1:])))  # the same sum of examples
    swapped = first._replace(client=others[0].client), others[0]._replace(client=first.client)
    refused(play, total, Proof(proof.tags, (*swapped, *others[1:])))


def test_another_run_round_or_other_terms_are_caught(play) -> None:
    total, proof = play.sum(play.uploads)
    refused(play, total, proof, round=2)
    refused(play, total, proof, run=b"S" * 16)
    refused(play, total, proof, terms=b"u" * 32)
    for other in (Authenticator(KEY[::-1], play.ring, MANIFEST), Authenticator(KEY, play.ring)):
        play.authenticator = other
        refused(play, total, proof)


def test_one_upload_with_another_round_or_other_terms_spoils_the_sum(play) -> None:
    refused(play, *play.sum([*play.uploads[:4], play.upload(4, round=2)]))
    refused(play, *play.sum([*play.uploads[:4], play.upload(4, terms=b"u" * 32)]))


def test_a_client_left_out_but_named_or_added_unnamed_is_caught(play) -> None:
    total, proof = play.sum(play.uploads[:4])
    whole = play.sum(play.uploads)[1]
    refused(play, total, Proof(proof.tags, whole.senders))
    refused(play, play.sum(play.uploads)[0], proof)
    refused(play, total, Proof(proof.tags, proof.senders[:3]))


def test_one_upload_added_three_times_is_caught(play) -> None:
    total, proof = play.sum([play.uploads[0]] * 3)
    refused(play, total, proof, "names a client twice")
    senders = tuple(proof.senders[0]._replace(client=client) for client in range(3))
    refused(play, total, Proof(proof.tags, senders))


def test_no_combination_of_two_uploads_of_a_client_asked_twice_passes(play) -> None:
    """The same client, round and numbers twice: their nonces differ, so a difference of tags is a difference of pads."""
    again = play.upload(0)
    (first, one), (second, other) = play.uploads[0], again
    total, proof = play.sum(play.uploads)
    prime = play.ring.prime
    for factor in (1, 2, prime - 2, prime - 1):
        changed = (total.astype(object) + factor * (first.astype(object) - second)) % prime
        tags = (proof.tags.astype(object) + factor * (one.tags.astype(object) - other.tags)) % prime
        forged = Proof(tags.astype(np.uint64), proof.senders)
        refused(play, changed.astype(np.uint64), forged)
        if factor != prime - 1:  # the second upload in the place of the first: a true sum
            senders = (other.senders[0], *proof.senders[1:])
            refused(play, changed.astype(np.uint64), replace(forged, senders=senders))
    refused(play, *play.sum([*play.uploads, again]), "names a client twice")
    play.check(*play.sum([again, *play.uploads[1:]]))  # one of them is a true upload


@pytest.mark.parametrize("stranger", [CLIENTS, 2**32 - 1])
def test_a_client_that_is_not_registered_is_refused(play, stranger) -> None:
    uploads = [*play.uploads[:4], play.upload(stranger)]
    refused(play, *play.sum(uploads), f"names client {stranger:,}, and the run's clients are 0 to 4")


def test_a_list_that_contradicts_the_header_or_is_too_short_is_refused(play) -> None:
    total, proof = play.sum(play.uploads)
    examples = sum(sender.examples for sender in proof.senders)
    refused(play, total, proof, f"5 clients with {examples + 1} examples that names", examples=examples + 1)
    refused(play, total, proof, "of 4 clients with", clients=4)
    refused(play, *play.sum(play.uploads[:2]), r"of 2 clients is not used: privacy\.protection\.min_clients = 3")
    refused(play, total, Proof(proof.tags, ()), "of 0 clients is not used")


# --- the digest of settings


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=3), st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
)
def test_settings_have_one_digest_only_where_they_are_the_same(one, other) -> None:
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert (settings_digest(one) == settings_digest(other)) == same
    assert settings_digest(dict(reversed(one.items()))) == settings_digest(one)


def test_settings_of_another_type_differ() -> None:
    digests = [settings_digest({"a": value}) for value in (1, 1.0, True, "1", b"1", [1], [], "", b"")]
    assert len(set(digests)) == len(digests)
    assert settings_digest({"a": np.float64(0.1)}) == settings_digest({"a": 0.1})
    with pytest.raises(TypeError, match="a setting of type NoneType"):
        settings_digest({"a": None})
