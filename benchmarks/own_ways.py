"""FedVeil's homomorphic encryption in the benchmark, and two yardsticks: no protection, and a shared mask.

Each way is a client and its server. The client makes the key and writes what the server needs into a folder.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.fixed_point import Layout, dequantize, quantize
from fedveil.privacy.homomorphic import wire
from fedveil.privacy.homomorphic.keys import CLIENT, SERVER, load_client, load_server, make_keys
from fedveil.privacy.homomorphic.lattice import Adder, Encryptor
from fedveil.privacy.homomorphic.mac import NONCE, Authenticator, Proof, Tally, proof_bytes
from fedveil.privacy.plan import make_plan

RUN = bytes(16)


class PlainClient:
    """A client that sends its weights as they are."""

    def __init__(self, folder: Path, size: int, clients: int) -> None: ...

    def protect(self, weights: np.ndarray, client: int, examples: int, reference: int) -> bytes:
        """Return the upload of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        return weights.tobytes()

    def open(self, download: bytes, clients: int, examples: int) -> np.ndarray:
        """Return the weighted mean, float32 [size]."""
        return np.frombuffer(download, np.float32)


class PlainServer:
    """A server that computes a weighted mean in NumPy."""

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._sum = np.zeros(size, np.float32)
        self._examples = 0

    def add(self, upload: bytes, client: int, examples: int, reference: int) -> None:
        """Add an upload."""
        self._sum += np.frombuffer(upload, np.float32) * np.float32(examples)
        self._examples += examples

    def total(self) -> bytes:
        """Return what clients download."""
        return (self._sum / np.float32(self._examples)).tobytes()


class SharedMaskClient:
    """A client that masks fixed-point weights, modulo 2^32, with a key that all clients share and the server has not.

    Client k adds stream k and subtracts stream k + 1, so that only the first and the last stream are left in the sum of
    all (Jiang et al. 2021, "FLASHE", the double mask). All clients must answer. It trusts clients as a shared HE key
    does: a yardstick of what such trust costs at least, and no protection that FedVeil offers.
    """

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._key = os.urandom(32)
        self._layout = Layout((("weights", (size,)),))
        self._grid = make_plan(Privacy(protection=ProtectionChoice("secagg")), clients).grid

    def protect(self, weights: np.ndarray, client: int, examples: int, reference: int) -> bytes:
        """Return the upload of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        whole, _ = quantize(weights, examples, reference, self._grid, self._layout)
        masked: np.ndarray = whole.astype(np.uint32) + self._stream(client) - self._stream(client + 1)
        return masked.tobytes()

    def open(self, download: bytes, clients: int, examples: int) -> np.ndarray:
        """Return the weighted mean, float32 [size]."""
        total = np.frombuffer(download, np.uint32) - self._stream(0) + self._stream(clients)
        return dequantize(total.view(np.int32), examples, examples, self._grid)

    def _stream(self, number: int) -> np.ndarray:
        """Return a stream of AES-256-CTR under the shared key, uint32 [size]."""
        cipher = Cipher(algorithms.AES(self._key), modes.CTR(number.to_bytes(8, "big") + bytes(8))).encryptor()
        return np.frombuffer(cipher.update(bytes(4 * self._layout.size)), np.uint32)


class SharedMaskServer:
    """A server that adds modulo 2^32."""

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._sum = np.zeros(size, np.uint32)

    def add(self, upload: bytes, client: int, examples: int, reference: int) -> None:
        """Add an upload."""
        self._sum += np.frombuffer(upload, np.uint32)

    def total(self) -> bytes:
        """Return what clients download."""
        return self._sum.tobytes()


class LatticeClient:
    """A client under CKKS or BFV with the default profile; compact: as in `lattice.Encryptor`.

    parts: seconds of CPU time of each part of authentication, by name, of every upload and download
    tag_bytes: of a ciphertext's tags
    """

    def __init__(self, protection: str, folder: Path, size: int, clients: int, compact: bool | None = None) -> None:
        self._plan = make_plan(Privacy(protection=ProtectionChoice(protection)), clients)
        assert self._plan.lattice is not None
        client_key, server_context = make_keys(self._plan.lattice)
        (folder / SERVER).write_bytes(server_context)
        path = folder / CLIENT
        path.touch(mode=0o600)
        path.write_bytes(client_key)
        self._key = load_client(path)
        self._encryptor = Encryptor(self._key, self._plan, compact)
        self._authenticator = Authenticator(self._key.mac, self._key.ring)
        self._registered = clients
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.tag_bytes = proof_bytes(self._key.ring, 1, 0)
        self._layout = Layout((("weights", (size,)),))

    def protect(self, weights: np.ndarray, client: int, examples: int, reference: int) -> bytes:
        """Return the upload of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        whole, _ = quantize(weights, examples, reference, self._plan.grid, self._layout)
        header = wire.expect(
            "upload", self._plan, self._key, run=RUN, round=1, layout=self._layout, client=client, reference=reference
        )
        encryptor = self._encryptor
        own = replace(
            header, seeded=encryptor.seeded, complex=encryptor.complex, examples=examples, nonce=os.urandom(NONCE)
        )
        body = encryptor.encrypt(whole, examples)
        with self._timed("expand_s"):
            chunks = list(encryptor.chunks(body, own.size, own.seeded))
        with self._timed("products_s"):
            tags = self._authenticator.tag(chunks, RUN, own.round, own.terms, own.sender)
        with self._timed("pads_s"):  # once more, to know their share of the line above
            self._authenticator.pads(len(chunks), own.terms, own.sender)
        return wire.write(own, body, Proof(tags, (own.sender,)))

    def open(self, download: np.ndarray, clients: int, examples: int) -> np.ndarray:
        """Return the weighted mean, float32 [size]."""
        expected = wire.expect(
            "aggregate", self._plan, self._key, run=RUN, round=1, layout=self._layout, complex=self._encryptor.complex
        )
        header, body, proof = wire.read(download.data, expected)
        with self._timed("check_s"):
            self._authenticator.check(
                self._encryptor.chunks(body, header.size, seeded=False), RUN, header.round, header.terms, proof,
                clients=header.clients, examples=header.examples, registered=self._registered, least=self._plan.least,
            )  # fmt: skip
        total = self._encryptor.decrypt(body, header.size, header.examples, header.clients)
        return dequantize(total, header.examples, header.reference, self._plan.grid)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.parts[part].append(time.process_time() - started)


class LatticeServer:
    """A server that adds uploads as they come."""

    def __init__(self, protection: str, folder: Path, size: int, clients: int) -> None:
        self._plan = make_plan(Privacy(protection=ProtectionChoice(protection)), clients)
        self._key = load_server(folder / SERVER)
        self._adder, self._tally = Adder(self._key, self._plan), Tally(self._key.ring)
        self._layout = Layout((("weights", (size,)),))
        self._complex = True
        self._examples = self._reference = 0
        self._tag_seconds = 0.0

    def add(self, upload: bytes, client: int, examples: int, reference: int) -> None:
        """Add an upload."""
        expected = wire.expect(
            "upload", self._plan, self._key, run=RUN, round=1, layout=self._layout, client=client, reference=reference
        )
        header, body, proof = wire.read(upload, expected)
        self._adder.add(body, header.form, header.seeded)
        started = time.process_time()
        self._tally.add(proof)
        self._tag_seconds += time.process_time() - started
        self._complex = header.complex
        self._examples += header.examples
        self._reference = reference

    def total(self) -> np.ndarray:
        """Return what clients download, uint8."""
        header = wire.expect(
            "aggregate", self._plan, self._key, run=RUN, round=1, layout=self._layout, complex=self._complex
        )
        whole = replace(header, clients=self._adder.clients, examples=self._examples, reference=self._reference)
        return wire.write_around(whole, self._adder.message(), self._tally.proof())

    def tag_seconds(self) -> float:
        """Return the CPU time of adding a client's tags, the mean of all."""
        return self._tag_seconds / self._adder.clients
