"""Reading and writing SEAL's and TenSEAL's bytes: the same as theirs, and nothing but a refusal for damaged ones."""

from __future__ import annotations

import multiprocessing
import os
import resource
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as sealapi
import zstandard
from helpers.fuzzing import inputs, parses
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.privacy.homomorphic import seal
from fedveil.privacy.homomorphic.keys import ClientKey

SCHEMES = ["ckks", "bfv"]


def encrypted(key: ClientKey, scale_bits: int) -> bytes:
    """A TenSEAL vector of the numbers 1, 2, 3, made by TenSEAL."""
    context = tenseal.context_from(key.context)
    if key.ring.scheme == "ckks":
        return tenseal.ckks_vector(context, [1.0, 2.0, 3.0], scale=2.0**scale_bits).serialize()
    return tenseal.bfv_vector(context, [1, 2, 3]).serialize()


def decrypted(key: ClientKey, vector: bytes) -> list[int]:
    context = tenseal.context_from(key.context)
    read = tenseal.ckks_vector_from if key.ring.scheme == "ckks" else tenseal.bfv_vector_from
    return [round(number) for number in read(context, vector).decrypt()]


@given(st.integers(4, 8), st.binary(min_size=8, max_size=400))
def test_trimming_keeps_the_low_bytes_of_every_coefficient(width, data):
    numbers = np.frombuffer(data[: len(data) // 8 * 8], "<u8") & np.uint64(2 ** (8 * width) - 1)
    slices = b"".join(int(number).to_bytes(8, "little")[:width] for number in numbers)
    assert seal.trim(numbers, width).tobytes() == slices
    assert np.array_equal(seal.untrim(slices, width), numbers)


@given(st.integers(4, 8), st.integers(4000, 9000), st.integers(0, 2**32))
@settings(max_examples=20)
def test_trimming_is_exact_at_the_sizes_of_polynomials(width, size, seed):
    numbers = np.random.default_rng(seed).integers(0, 2 ** (8 * width), size, np.uint64)
    trimmed = seal.trim(numbers, width)
    assert np.array_equal(trimmed.reshape(-1, width), numbers.view(np.uint8).reshape(-1, 8)[:, :width])
    assert np.array_equal(seal.untrim(trimmed, width), numbers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_are_read_as_seal_has_them(parties, scheme, tmp_path):
    key = parties(scheme).client
    path = tmp_path / "parameters"
    path.write_bytes(key.parameters)
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.load(str(path))
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    ring = key.ring
    assert [ring.prime, ring.special] == [prime.value() for prime in parameters.coeff_modulus()]
    assert ring.plain == (parameters.plain_modulus().value() if scheme == "bfv" else 0)
    assert ring.parms_id == struct.pack("<4Q", *context.first_parms_id())
    assert ring.lattice == parties(scheme).plan.lattice


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_ciphertext_read_and_written_again_decrypts_with_tenseal(parties, scheme):
    p = parties(scheme)
    scale_bits, ring = p.plan.scale_bits, p.client.ring
    read = seal.read_ciphertext(seal.read_vector(encrypted(p.client, scale_bits))[0], ring)
    assert read.coefficients.shape == (2, ring.degree)
    assert read.coefficients.max() < ring.prime
    assert read.seed == b""
    again = seal.write_ciphertext(read.coefficients, ring, scale_bits, read.version)
    assert decrypted(p.client, seal.write_vector([again], 3, scale_bits)) == [1, 2, 3]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seeded_ciphertext_is_half_and_decrypts_with_tenseal(parties, scheme, tmp_path):
    p = parties(scheme)
    ring, path = p.client.ring, str(tmp_path / "file")
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    Path(path).write_bytes(p.client.parameters)
    parameters.load(path)
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    Path(path).write_bytes(p.client.secret)
    secret, plain = sealapi.SecretKey(), sealapi.Plaintext()
    secret.load(context, path)
    if scheme == "ckks":
        sealapi.CKKSEncoder(context).encode([1.0, 2.0, 3.0], 2.0**p.plan.scale_bits, plain)
    else:
        sealapi.BatchEncoder(context).encode([1, 2, 3], plain)
    sealapi.Encryptor(context, secret).encrypt_symmetric(plain).save(path)
    read = seal.read_ciphertext(Path(path).read_bytes(), ring)
    assert read.coefficients.shape == (1, ring.degree)
    assert len(read.seed) == seal.SEED
    again = seal.write_ciphertext(read.coefficients, ring, p.plan.scale_bits, read.version, read.seed)
    assert decrypted(p.client, seal.write_vector([again], 3, p.plan.scale_bits)) == [1, 2, 3]


def test_a_ciphertext_under_other_parameters_is_refused(parties):
    blob = seal.read_vector(encrypted(parties("bfv").client, 0))[0]
    with pytest.raises(ProtectionError, match="other parameters"):
        seal.read_ciphertext(blob, parties("ckks").client.ring)


def test_an_object_of_another_length_than_it_says_is_refused(parties):
    good = parties("ckks").client.parameters
    for bad in (good + b"x", good[:-1], good[:8] + struct.pack("<Q", 2**62) + good[16:]):
        with pytest.raises(ProtectionError, match="a SEAL object of"):
            seal.read_ring(bad)


@pytest.mark.parametrize("announced", [True, False])
def test_a_small_object_that_unpacks_to_a_gigabyte_is_refused_without_the_memory(parties, announced):
    if announced:
        packed = zstandard.ZstdCompressor().compress(bytes(2**28))
    else:
        stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        packed = stream.compress(bytes(2**28)) + stream.flush()
    bomb = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(packed)) + packed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProtectionError, match=r"at most|cannot be decompressed"):
        seal.read_ciphertext(bomb, parties("ckks").client.ring)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**26 // 1024  # kB


def readers(ring):
    return {
        "context": seal.read_context,
        "ring": seal.read_ring,
        "vector": seal.read_vector,
        "ciphertext": lambda data: seal.read_ciphertext(data, ring),
    }


@parses("seal.read_context", "seal.read_ring", "seal.read_vector", "seal.read_ciphertext", usual=1000)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_read_and_nothing_else(parties, data):
    prefixed = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(data)) + data
    plain = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, 16 + len(data)) + data
    for read in readers(parties("ckks").client.ring).values():
        for candidate in (data, prefixed, plain):
            try:
                read(candidate)
            except ProtectionError:
                continue


@pytest.mark.fuzz("seal.read_*, damaged objects")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_damaged_objects_are_refused_or_read_and_nothing_else(parties, scheme):
    p = parties(scheme)
    vector = encrypted(p.client, p.plan.scale_bits)
    (blob,) = seal.read_vector(vector)
    read = seal.read_ciphertext(blob, p.client.ring)
    plain = seal.write_ciphertext(read.coefficients, p.client.ring, p.plan.scale_bits, read.version)
    seeded = seal.write_ciphertext(read.coefficients[:1], p.client.ring, p.plan.scale_bits, read.version, bytes(64))
    whole = [("context", p.server.context), ("ring", p.client.parameters), ("vector", vector[:3000])]
    whole += [("ciphertext", blob), ("ciphertext", plain), ("ciphertext", seeded)]
    rng, refused = np.random.default_rng(0), 0
    for name, good in whole:
        reader = readers(p.client.ring)[name]
        for turn in range(inputs(500)):
            bad = bytearray(good)
            for place in rng.integers(0, min(len(bad), 200 if turn % 2 else len(bad)), rng.integers(1, 4)):
                bad[place] = rng.integers(256)
            if turn % 5 == 0:
                bad = bad[: rng.integers(len(bad))]
            try:
                reader(bytes(bad))
            except ProtectionError:
                refused += 1
    assert refused > inputs(500)


def test_lengths_beyond_the_bytes_are_refused_before_they_are_used():
    for length in (1, 2**20, 2**40, 2**63):
        with pytest.raises(ProtectionError, match="cut short"):
            seal.read_context(b"\x0a" + seal.write_varint(length))
    for bad in (b"\xff" * 30, b"\x0b\x0c", b"\x0e", b"\x02\x00"):  # a number without end, a group, no kind, no field
        with pytest.raises(ProtectionError, match="not TenSEAL's bytes"):
            seal.read_context(bad)


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.integers(0, 2**64 - 1) | st.binary(max_size=300)), max_size=8))
def test_fields_are_read_in_order_as_they_were_written(fields):
    written = b"".join(
        seal.write_field(number, value)
        if isinstance(value, bytes)
        else seal.write_varint(number << 3) + seal.write_varint(value)
        for number, value in fields
    )
    assert list(seal.read_fields(written)) == fields


def test_fields_of_a_fixed_size_are_bytes():
    assert list(seal.read_fields(b"\x09" + b"12345678" + b"\x15" + b"\xff234")) == [(1, b"12345678"), (2, b"\xff234")]


def test_a_forked_process_has_a_scratch_file_of_its_own():
    scratch = seal.Scratch()
    scratch.loaded(lambda path: None, b"of the parent")
    ours = scratch.saved(lambda path: None)

    def child(queue) -> None:
        scratch.loaded(lambda path: None, b"of the child, and longer")
        queue.put(scratch.saved(lambda path: None))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    theirs = queue.get(timeout=30)
    process.join()
    assert (ours, theirs) == (b"of the parent", b"of the child, and longer")
    assert scratch.saved(lambda path: None) == b"of the parent"


def test_without_files_in_memory_a_private_temporary_one_serves_and_goes(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch, seen = seal.Scratch(), []

    def save(path: str) -> None:
        seen.append(Path(path))
        Path(path).write_bytes(b"saved")
        assert Path(path).parent.stat().st_mode & 0o777 == 0o700
        assert Path(path).stat().st_mode & 0o777 == 0o600

    assert scratch.saved(save) == b"saved"
    assert seen[0].is_relative_to(tmp_path)
    del scratch
    assert not seen[0].exists()
