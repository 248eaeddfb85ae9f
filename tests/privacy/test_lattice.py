"""Encrypt, add, decrypt: exactly the sum of whole numbers, and a refusal where it would not be."""

from __future__ import annotations

import multiprocessing
import struct
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as sealapi
from helpers.fuzzing import parses
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic import lattice as lattice_module
from fedveil.privacy.homomorphic import seal
from fedveil.privacy.homomorphic.keys import ClientKey, load_client, load_server, write_keys
from fedveil.privacy.homomorphic.lattice import Adder, Encryptor, Form
from fedveil.privacy.plan import make_plan

WAYS = [("ckks", True), ("ckks", False), ("bfv", True), ("bfv", False)]


@pytest.fixture(scope="module")
def encryptors(parties):
    """An encryptor by scheme and way, made once."""
    made: dict[tuple[str, bool], Encryptor] = {}

    def get(scheme: str, compact: bool) -> Encryptor:
        if (scheme, compact) not in made:
            made[scheme, compact] = Encryptor(parties(scheme).client, parties(scheme).plan, compact)
        return made[scheme, compact]

    return get


def uploads(encryptor: Encryptor, clients: int, size: int, seed: int = 0):
    """Bodies of clients with random numbers, the plain sum, and the sum of examples."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-100_000, 100_001, (clients, size))
    examples = rng.integers(1, 1000, clients)
    bodies = [encryptor.encrypt(row, int(n)) for row, n in zip(values, examples, strict=True)]
    return bodies, values.sum(0), int(examples.sum())


def added(p, encryptor: Encryptor, bodies, size: int) -> bytes:
    adder = Adder(p.server, p.plan)
    for body in bodies:
        adder.add(body, encryptor.form(size), encryptor.seeded)
    return bytes(adder.total())


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
@given(
    st.integers(3, 12), st.integers(1, 9000), st.sampled_from(["random", "high", "low", "zero"]), st.integers(0, 2**32)
)
@settings(max_examples=8, deadline=None)
def test_what_is_decrypted_is_exactly_the_sum_of_what_was_encrypted(
    parties, encryptors, scheme, compact, k, size, kind, seed
):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    rng, most = np.random.default_rng(seed), p.plan.grid.most
    examples = rng.integers(1, 5000, k)
    share = examples / examples.sum()
    weights = {"high": np.ones(size), "low": -np.ones(size), "zero": np.zeros(size)}.get(kind)
    values = [
        np.rint((rng.uniform(-1, 1, size) if weights is None else weights) * most * part).astype(np.int64)
        for part in share
    ]
    adder = Adder(p.server, p.plan)
    for row, n in zip(values, examples, strict=True):
        adder.add(encryptor.encrypt(row, int(n)), encryptor.form(size), encryptor.seeded)
    total = encryptor.decrypt(adder.total(), size, int(examples.sum()), k)
    assert total.dtype == np.int64
    assert np.array_equal(total, np.sum(values, axis=0))


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_one_client_may_reach_the_range_in_every_number_with_every_example(parties, encryptors, scheme, compact):
    """Cohort and weights at their most at once: the fullest chunk that the plan allows."""
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    most = p.plan.grid.most
    for sign in (1, -1):
        values = [np.full(5000, sign * (most - 11))] + [np.full(5000, sign)] * 11
        examples = [most - 11] + [1] * 11
        bodies = [encryptor.encrypt(row, n) for row, n in zip(values, examples, strict=True)]
        total = encryptor.decrypt(added(p, encryptor, bodies, 5000), 5000, most, 12)
        assert np.array_equal(total, np.full(5000, sign * most))


def test_two_numbers_share_a_slot_of_bfv_with_every_mix_of_signs(encryptors):
    encryptor = encryptors("bfv", True)
    half = 2**21
    edge = [-half, -half + 1, -1, 0, 1, half - 2, half - 1]
    numbers = np.array([[low, high] for low in edge for high in edge]).reshape(-1)
    slots = encryptor._slots(numbers)
    assert [int(low) + (int(high) << 22) for low, high in numbers.reshape(-1, 2)] == slots.tolist()
    assert np.array_equal(encryptor._numbers(slots), numbers)


@pytest.mark.parametrize(("scheme", "compact", "up", "down"), [("ckks", True, 5.1, 10.1), ("ckks", False, 20.1, 20.1),
                                                               ("bfv", True, 3.6, 7.1), ("bfv", False, 7.1, 7.1)])  # fmt: skip
def test_a_million_numbers_take_as_few_bytes_as_promised(parties, encryptors, scheme, compact, up, down):
    form = encryptors(scheme, compact).form(1_000_000)
    assert form.bytes(seeded=compact) / 1e6 <= up
    assert form.bytes(seeded=False) / 1e6 <= down
    encryptor = encryptors(scheme, compact)
    body = encryptor.encrypt(np.zeros(10_000, np.int64), 1)
    assert len(body) == encryptor.form(10_000).bytes(compact)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_the_order_of_adding_does_not_change_a_byte(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    bodies, _, _ = uploads(encryptor, 5, 9000)
    first = added(p, encryptor, bodies, 9000)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert added(p, encryptor, [bodies[k] for k in order], 9000) == first


def test_seeds_that_wait_give_the_bytes_of_seeds_that_do_not_and_never_wait_for_long(parties, encryptors):
    p, encryptor = parties("bfv"), encryptors("bfv", True)
    bodies, _, _ = uploads(encryptor, 7, 9000)
    whole = added(p, encryptor, bodies, 9000)
    adder = Adder(p.server, p.plan, pending=2)
    for body in bodies:
        adder.add(body, encryptor.form(9000), True)
        assert len(adder._seeds) < 2
    assert bytes(adder.total()) == whole


def test_seeded_and_unseeded_uploads_of_bfv_add_together(parties, encryptors):
    p, short, long = parties("bfv"), encryptors("bfv", True), encryptors("bfv", False)
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (4, 9000))
    adder = Adder(p.server, p.plan)
    for k, row in enumerate(values):
        encryptor = short if k % 2 else long
        adder.add(encryptor.encrypt(row, 10), encryptor.form(9000), encryptor.seeded)
    for encryptor in (short, long):
        assert np.array_equal(encryptor.decrypt(adder.total(), 9000, 40, 4), values.sum(0))


def test_packings_of_ckks_do_not_mix(parties, encryptors):
    p, short, long = parties("ckks"), encryptors("ckks", True), encryptors("ckks", False)
    adder, row = Adder(p.server, p.plan), np.zeros(100, np.int64)
    adder.add(short.encrypt(row, 1), short.form(100), short.seeded)
    with pytest.raises(ProtectionError, match="another form"):
        adder.add(long.encrypt(row, 1), long.form(100), long.seeded)
    assert adder.clients == 1


def test_the_public_interface_serves_where_seals_own_is_missing(parties, monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    p = parties("bfv")
    encryptor = Encryptor(p.client, p.plan)
    assert not encryptor.seeded
    bodies, total, examples = uploads(encryptor, 3, 100)
    assert np.array_equal(encryptor.decrypt(added(p, encryptor, bodies, 100), 100, examples, 3), total)
    with pytest.raises(ProtectionError, match=r"need tenseal\.sealapi"):
        Encryptor(p.client, p.plan, compact=True)


def test_compact_ciphertexts_are_taken_where_they_work(parties):
    assert lattice_module.compact_works()
    assert Encryptor(parties("ckks").client, parties("ckks").plan).seeded


# What goes wrong on the way shows on decryption.


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_another_key_shows_on_decryption(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    stranger = Encryptor(parties(scheme, 1).client, p.plan, compact)
    bodies, _, examples = uploads(encryptor, 3, 5000)
    with pytest.raises(ProtectionError, match="another key"):
        stranger.decrypt(added(p, encryptor, bodies, 5000), 5000, examples, 3)
    mixed = [*bodies[:2], stranger.encrypt(np.zeros(5000, np.int64), 1)]
    with pytest.raises(ProtectionError, match="another key"):
        encryptor.decrypt(added(p, encryptor, mixed, 5000), 5000, examples, 3)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_a_client_lost_or_added_twice_shows_on_decryption(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    bodies, _, examples = uploads(encryptor, 4, 5000)
    for wrong in (bodies[:3], [*bodies, bodies[0]], [*bodies[:3], bodies[0]]):
        with pytest.raises(ProtectionError, match="lost or added twice"):
            encryptor.decrypt(added(p, encryptor, wrong, 5000), 5000, examples, 4)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_a_chunk_lost_doubled_or_emptied_shows_on_decryption(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    size, form = 20_000, encryptors(scheme, compact).form(20_000)
    bodies, total, examples = uploads(encryptor, 3, size)
    whole, length = added(p, encryptor, bodies, size), form.chunk_bytes(False)
    assert np.array_equal(encryptor.decrypt(whole, size, examples, 3), total)
    with pytest.raises(ProtectionError, match="bytes, where"):
        encryptor.decrypt(whole[length:], size, examples, 3)
    emptied = whole[:length] + bytes(length) + whole[2 * length :]
    with pytest.raises(ProtectionError, match="chunk 1"):
        encryptor.decrypt(emptied, size, examples, 3)
    twice = Adder(p.server, p.plan)
    twice.add(whole, form, False)
    twice.add(whole[:length] + bytes(len(whole) - length), form, False)
    with pytest.raises(ProtectionError, match="chunk 0"):
        encryptor.decrypt(twice.total(), size, examples, 3)


def test_chunks_in_another_order_do_not_show_on_decryption(parties, encryptors):
    """Every chunk's reserved numbers are the same: only the checksum of the message is against this accident."""
    p, encryptor = parties("bfv"), encryptors("bfv", True)
    step = encryptor.form(1).numbers - 2
    bodies, total, examples = uploads(encryptor, 3, 2 * step)
    whole = added(p, encryptor, bodies, 2 * step)
    half = len(whole) // 2
    swapped = encryptor.decrypt(whole[half:] + whole[:half], 2 * step, examples, 3)
    assert np.array_equal(swapped, np.roll(total, step))


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_garbage_decrypts_to_a_refusal(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    ring, form = p.client.ring, encryptor.form(5000)
    rng = np.random.default_rng(0)
    garbage = rng.integers(0, ring.prime, form.chunks * 2 * ring.degree, np.uint64)
    for body in (seal.trim(garbage, ring.width).tobytes(), bytes(form.bytes(False))):
        with pytest.raises(ProtectionError, match="does not decrypt"):
            encryptor.decrypt(body, 5000, 30, 3)
    with pytest.raises(ProtectionError, match="not below the prime"):
        encryptor.decrypt(b"\xff" * form.bytes(False), 5000, 30, 3)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_an_overflow_or_what_lies_outside_the_range_shows_on_decryption(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    body = encryptor.encrypt(np.full(3000, p.plan.grid.most), 10)
    with pytest.raises(ProtectionError, match="does not decrypt"):
        encryptor.decrypt(added(p, encryptor, [body] * 3, 3000), 3000, 30, 3)
    padded = encryptor.encrypt(np.arange(3000), 10)
    with pytest.raises(ProtectionError, match="after the last number"):
        encryptor.decrypt(added(p, encryptor, [padded] * 3, 2990), 2990, 30, 3)


def test_too_few_or_too_many_clients_are_refused_by_name(parties, encryptors):
    p, encryptor = parties("ckks"), encryptors("ckks", True)
    for clients in (0, 1, 2, p.plan.clients + 1):
        with pytest.raises(ProtectionError, match=r"privacy\.protection\.min_clients = 3"):
            encryptor.decrypt(b"", 1, 30, clients)


def test_numbers_outside_the_grid_are_not_encrypted(parties, encryptors):
    encryptor, most = encryptors("ckks", True), parties("ckks").plan.grid.most
    for bad in ([most + 2], [0, -most - 2]):
        with pytest.raises(ProtectionError, match="outside the grid"):
            encryptor.encrypt(np.array(bad), 1)
    for examples in (0, -1, most + 1):
        with pytest.raises(ProtectionError, match="cannot be counted on this grid"):
            encryptor.encrypt(np.zeros(3, np.int64), examples)


# The server's side.


def test_the_adder_refuses_one_client_too_many(parties, encryptors):
    p, encryptor = parties("ckks"), encryptors("ckks", True)
    adder, form = Adder(p.server, p.plan), encryptor.form(10)
    body = encryptor.encrypt(np.zeros(10, np.int64), 1)
    for _ in range(p.plan.clients):
        adder.add(body, form, True)
    with pytest.raises(ProtectionError, match=f"{p.plan.clients} clients are added already"):
        adder.add(body, form, True)


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_an_upload_is_added_whole_or_not_at_all(parties, encryptors, scheme, compact):
    p, encryptor = parties(scheme), encryptors(scheme, compact)
    bodies, total, examples = uploads(encryptor, 3, 9000)
    form, adder = encryptor.form(9000), Adder(p.server, p.plan)
    bad = bytearray(bodies[0])
    bad[-p.client.ring.width :] = b"\xff" * p.client.ring.width  # the very last coefficient
    for body in bodies:
        for wrong in (bytes(bad), body[:-1], body + b"x", b"", body[: len(body) // 2], body[:10]):
            with pytest.raises(ProtectionError, match=r"not below the prime|bytes, where"):
                adder.add(wrong, form, encryptor.seeded)
        adder.add(body, form, encryptor.seeded)
    assert adder.clients == 3
    assert np.array_equal(encryptor.decrypt(adder.total(), 9000, examples, 3), total)
    with pytest.raises(ProtectionError, match="made already"):
        adder.add(bodies[0], form, encryptor.seeded)


@pytest.mark.slow
@parses("Adder.add", usual=200)
@given(st.binary(max_size=64), st.integers(1, 3))
def test_random_bodies_are_refused_or_added(parties, encryptors, data, fill):
    p, encryptor = parties("bfv"), encryptors("bfv", True)
    form, adder = encryptor.form(9000), Adder(p.server, p.plan)
    body = (data * (form.bytes(True) // max(len(data), 1) + 1))[: form.bytes(True)] if fill == 1 else data * fill
    try:
        adder.add(body, form, True)
    except ProtectionError:
        assert adder.clients == 0
    else:
        assert len(adder.total()) == form.bytes(False)


@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_the_servers_memory_does_not_grow_with_clients(parties, encryptors, scheme):
    p, encryptor = parties(scheme), encryptors(scheme, True)
    size = 200_000
    form, body = encryptor.form(size), encryptor.encrypt(np.zeros(size, np.int64), 1)
    peaks = []
    for clients in (3, 12):
        tracemalloc.start()
        adder = Adder(p.server, p.plan)
        for _ in range(clients):
            adder.add(body, form, True)
        assert len(adder.total()) == form.bytes(False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.1 * form.bytes(False)
    assert peaks[1] < 1.5 * form.bytes(False)


def test_keys_for_another_plan_are_refused(parties):
    for make in (lambda p, plan: Encryptor(p.client, plan), lambda p, plan: Adder(p.server, plan)):
        with pytest.raises(SettingsError, match=r"privacy\.protection"):
            make(parties("ckks"), parties("bfv").plan)


# Randomness, and readers that are not ours.


def seeds_of(encryptor: Encryptor, count: int) -> list[bytes]:
    values = np.zeros(10, np.int64)
    return [encryptor.encrypt(values, 1)[: seal.SEED] for _ in range(count)]


def test_encryptions_never_share_a_seed_in_one_process_or_in_forked_ones(parties, encryptors):
    encryptor = encryptors("bfv", True)
    first = seeds_of(encryptor, 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=lambda: queue.put(seeds_of(encryptor, 20))) for _ in range(3)]
    for process in processes:
        process.start()
    seeds = first + [seed for _ in processes for seed in queue.get(timeout=60)] + seeds_of(encryptor, 20)
    for process in processes:
        process.join()
    assert len(set(seeds)) == len(seeds) == 100


@pytest.mark.parametrize(("scheme", "compact"), WAYS)
def test_equal_numbers_give_unequal_ciphertexts(encryptors, scheme, compact):
    encryptor = encryptors(scheme, compact)
    first, second = (np.frombuffer(encryptor.encrypt(np.zeros(10, np.int64), 1), np.uint8) for _ in range(2))
    assert np.mean(first == second) < 0.02  # as often as random bytes agree, 1 / 256


def test_the_compact_way_is_seals_own(parties, tmp_path, encryptors):
    """What an encryptor made, SEAL's own interface opens: slots in order, at the plan's scale."""
    p, encryptor = parties("ckks"), encryptors("ckks", True)
    values = np.arange(-2047, 2047)
    total = added(p, encryptor, [encryptor.encrypt(values, 5)] * 3, len(values))
    numbers = np.array(slots_by_sealapi(p.client, total, p.plan.scale_bits, tmp_path)) / p.plan.grid.step
    assert (round(numbers[0].real), round(numbers[0].imag)) == (15, 3)
    assert np.array_equal(np.rint(numbers[1:].view(float)).astype(int), 3 * values)


def slots_by_sealapi(key: ClientKey, chunk: bytes, scale_bits: int, folder) -> list[complex]:
    path = folder / "file"
    path.write_bytes(key.parameters)
    parameters, secret = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS), sealapi.SecretKey()
    parameters.load(str(path))
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    path.write_bytes(key.secret)
    secret.load(context, str(path))
    ring = key.ring
    data = b"".join(chunk[at : at + ring.width].ljust(8, b"\0") for at in range(0, len(chunk), ring.width))
    inner = struct.pack("<HBBBBHQQ", 0xA15E, 16, 4, 3, 0, 0, 24 + len(data), len(data) // 8) + data
    shape = struct.pack("<4QBQQQdQ", *context.first_parms_id(), 1, 2, ring.degree, 1, 2.0**scale_bits, 1)
    path.write_bytes(struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, 16 + len(shape + inner)) + shape + inner)
    ciphertext, plain = sealapi.Ciphertext(), sealapi.Plaintext()
    ciphertext.load(context, str(path))
    sealapi.Decryptor(context, secret).decrypt(ciphertext, plain)
    return sealapi.CKKSEncoder(context).decode_complex(plain)


def test_another_degree_and_modulus_work_alike(tmp_path_factory):
    """The user's own parameters: nothing is tied to the profiles' degree or bytes a coefficient."""
    for settings_ in (
        {"name": "ckks", "profile": "conservative"},
        {"name": "ckks", "profile": "own", "degree": 8192, "primes": (54, 60)},
        {"name": "ckks", "profile": "own", "degree": 4096, "primes": (60, 40), "range": 2.0},
        {"name": "bfv", "profile": "own", "degree": 8192, "primes": (60, 50), "plain_bits": 46},
    ):
        plan = make_plan(Privacy(protection=settings_), 3)
        folder = tmp_path_factory.mktemp("own") / "keys"
        write_keys(folder, plan.lattice, 1)
        client, server = load_client(folder / "client-1/client.key"), load_server(folder / "server/server.ctx")
        for compact in (True, False):
            encryptor, adder = Encryptor(client, plan, compact), Adder(server, plan)
            values = np.random.default_rng(0).integers(-plan.grid.most // 3, plan.grid.most // 3, (3, 20_000))
            for row in values:
                adder.add(encryptor.encrypt(row, 7), Form(plan.lattice, 20_000, encryptor.complex), encryptor.seeded)
            assert np.array_equal(encryptor.decrypt(adder.total(), 20_000, 21, 3), values.sum(0))


def test_a_plain_tenseal_vector_of_the_sum_is_what_the_servers_context_opens(parties, encryptors):
    p, encryptor = parties("bfv"), encryptors("bfv", False)
    bodies, total, _ = uploads(encryptor, 3, 100)
    ring = p.client.ring
    blob = seal.write_ciphertext(
        seal.untrim(added(p, encryptor, bodies, 100), ring.width).reshape(2, -1), ring, 0, p.client.version
    )
    vector = tenseal.bfv_vector_from(tenseal.context_from(p.server.context), seal.write_vector([blob], ring.degree, 0))
    with pytest.raises(ValueError, match="secret"):
        vector.decrypt()
    vector = tenseal.bfv_vector_from(tenseal.context_from(p.client.context), seal.write_vector([blob], ring.degree, 0))
    slots = np.array(vector.decrypt())
    assert np.array_equal(encryptor._numbers(slots)[2:102], total)


@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_other_threads_go_on_while_a_client_encrypts_and_decrypts(parties, scheme) -> None:
    """TenSEAL holds the interpreter's lock for a whole call: in one call a heartbeat would have to wait for all of it."""
    p = parties(scheme)
    encryptor, adder = Encryptor(p.client, p.plan), Adder(p.server, p.plan)
    form = encryptor.form(300_000)
    turns = 0
    over = threading.Event()

    def beat() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            time.sleep(0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # a turn whenever a call ends
    heart = threading.Thread(target=beat)
    heart.start()
    try:
        body = encryptor.encrypt(np.zeros(300_000, np.int64), 1)
        encrypting = turns
        for _ in range(3):
            adder.add(body, form, encryptor.seeded)
        turns = 0
        encryptor.decrypt(adder.total(), 300_000, 3, 3)
        decrypting = turns
    finally:
        over.set()
        heart.join()
        sys.setswitchinterval(before)
    assert encrypting > form.chunks / 2
    assert decrypting > form.chunks / 2


@pytest.mark.parametrize(
    ("protection", "cohort"), [("ckks", 100), ("ckks", 1000), ("bfv", 688)], ids=["ckks-100", "ckks-1000", "bfv-688"]
)
def test_as_many_clients_as_the_plan_allows_may_send_the_very_same(tmp_path, protection, cohort) -> None:
    """Rounding errors of equal chunks are equal, and grow with the clients rather than with their root."""
    plan = make_plan(Privacy(protection=protection), cohort)
    write_keys(tmp_path / "keys", plan.lattice, 1)
    client = load_client(tmp_path / "keys" / "client-1" / "client.key")
    adder = Adder(load_server(tmp_path / "keys" / "server" / "server.ctx"), plan)
    encryptor, size = Encryptor(client, plan), plan.lattice.numbers - 2
    most = plan.grid.most // plan.clients
    values = np.random.default_rng(0).integers(-most, most + 1, size)
    for _ in range(plan.clients):
        adder.add(encryptor.encrypt(values, 1), encryptor.form(size), encryptor.seeded)
    total = encryptor.decrypt(adder.total(), size, plan.clients, plan.clients)
    np.testing.assert_array_equal(total, values * plan.clients)
