"""Who knows an aggregate's ciphertext and its decryption with the noise in it has the secret key; ours hold no noise.

Li and Micciancio 2021, section 3.2: a CKKS ciphertext (c0, c1) decrypts to m + e = c0 + c1 s. Encode what was published,
and s = (m + e - c0) / c1, in each of the N points of the number-theoretic transform. A float32 average is exact enough.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tenseal.sealapi as sealapi

from fedveil.privacy.fixed_point import dequantize
from fedveil.privacy.homomorphic import seal
from fedveil.privacy.homomorphic.keys import ClientKey
from fedveil.privacy.homomorphic.lattice import Adder, Encryptor

CLIENTS, EXAMPLES = 10, 100
REFERENCE = CLIENTS * EXAMPLES


def aggregate(p, encryptor: Encryptor, values: np.ndarray) -> bytes:
    adder = Adder(p.server, p.plan)
    for row in values:
        adder.add(encryptor.encrypt(row, EXAMPLES), encryptor.form(len(row)), encryptor.seeded)
    return bytes(adder.total())


def polynomials(chunk: bytes, key: ClientKey) -> tuple[np.ndarray, np.ndarray]:
    """c0 and c1 of a chunk of an aggregate, as Python's whole numbers."""
    c0, c1 = seal.untrim(chunk, key.ring.width).reshape(2, -1).astype(object)
    return c0, c1


def raw_average(p, encryptor: Encryptor, chunk: bytes) -> np.ndarray:
    """What a client without our snap would publish: all that the slots hold, float32."""
    coefficients = seal.untrim(chunk, p.client.ring.width).reshape(2, -1)
    blob = seal.write_ciphertext(coefficients, p.client.ring, p.plan.scale_bits, p.client.version)
    return encryptor._cipher.decrypt(blob).astype(np.float32)


def snapped_average(p, encryptor: Encryptor, body: bytes, size: int) -> np.ndarray:
    total = encryptor.decrypt(body, size, REFERENCE, CLIENTS)
    return dequantize(total, REFERENCE, REFERENCE, p.plan.grid)


def recover(published: np.ndarray, chunk: bytes, p, folder: Path) -> np.ndarray:
    """The key's polynomial that a server computes from the ciphertext and what was published for all slots of it."""
    ring, path = p.server.ring, folder / "file"
    path.write_bytes(p.client.parameters)  # public
    parameters, plain = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS), sealapi.Plaintext()
    parameters.load(str(path))
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    slots = published.astype(np.float64).view(np.complex128).tolist()
    sealapi.CKKSEncoder(context).encode(slots, 2.0**p.plan.scale_bits, plain)
    message = np.array([plain.data(index) for index in range(ring.degree)], object)
    c0, c1 = polynomials(chunk, p.client)
    inverse = np.array([pow(int(value), -1, ring.prime) for value in c1], object)
    return (message - c0) * inverse % ring.prime


def read_with(recovered: np.ndarray, chunk: bytes, p, stranger: Encryptor) -> np.ndarray:
    """The slots of a chunk as the recovered key opens it. Somebody else's encryptor decodes c0 + c1 s: no key is in play."""
    c0, c1 = polynomials(chunk, p.client)
    opened = ((c0 + c1 * recovered) % p.client.ring.prime).astype(np.uint64)
    coefficients = np.stack([opened, np.zeros_like(opened)])
    blob = seal.write_ciphertext(coefficients, p.client.ring, p.plan.scale_bits, p.client.version)
    return stranger._cipher.decrypt(blob)


@pytest.fixture(scope="module")
def case(parties):
    """Parties, an encryptor, one of another key, a victim's numbers and upload, and the aggregate of ten others."""
    p = parties("ckks")
    encryptor, stranger = Encryptor(p.client, p.plan, True), Encryptor(parties("ckks", 1).client, p.plan, True)
    size = encryptor.form(1).numbers - 2
    rng = np.random.default_rng(0)
    values = np.rint(rng.normal(0, 0.02, (CLIENTS, size)) / CLIENTS / p.plan.grid.step).astype(np.int64)
    victim = np.rint(rng.normal(0, 0.5, size) / p.plan.grid.step).astype(np.int64)
    alone = Adder(p.server, p.plan)
    alone.add(encryptor.encrypt(victim, EXAMPLES), encryptor.form(size), True)
    return p, encryptor, stranger, values, victim, bytes(alone.total())


def test_a_published_average_with_its_noise_gives_the_key_away(case, tmp_path):
    p, encryptor, stranger, values, victim, upload = case
    body = aggregate(p, encryptor, values)
    recovered = recover(raw_average(p, encryptor, body), body, p, tmp_path)
    numbers = read_with(recovered, upload, p, stranger)[2:] / p.plan.grid.step
    assert np.array_equal(np.rint(numbers).astype(np.int64), victim)


def test_what_we_publish_does_not_give_the_key_away(case, tmp_path):
    p, encryptor, stranger, values, victim, upload = case
    body = aggregate(p, encryptor, values)
    ours = snapped_average(p, encryptor, body, values.shape[1])
    step = p.plan.grid.step
    published = np.concatenate(
        [np.float32([REFERENCE * step, CLIENTS * step]), ours]
    )  # the reserved numbers are public
    numbers = read_with(recover(published, body, p, tmp_path), upload, p, stranger)[2:] / step
    assert np.mean(np.abs(numbers - victim) < 1000) < 0.01  # a guess hits as often


def test_what_we_publish_is_a_function_of_the_plain_sum_alone(case):
    """The proof that the attack above is only an example of: fresh encryptions change nothing in it."""
    p, encryptor, _, values, _, _ = case
    bodies = [aggregate(p, encryptor, values) for _ in range(3)]
    assert len(set(bodies)) == 3
    raw = {raw_average(p, encryptor, body).tobytes() for body in bodies}
    assert len(raw) == 3
    published = {snapped_average(p, encryptor, body, values.shape[1]).tobytes() for body in bodies}
    plain = dequantize(values.sum(0), REFERENCE, REFERENCE, p.plan.grid)
    assert published == {plain.tobytes()}
    reordered = np.roll(values, 3, axis=0)
    reordered[0] += 5
    reordered[1] -= 5  # other clients, the same sum
    body = aggregate(p, encryptor, reordered)
    assert snapped_average(p, encryptor, body, values.shape[1]).tobytes() == plain.tobytes()
