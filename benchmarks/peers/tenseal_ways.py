"""Federated averaging with TenSEAL as others do it: its tutorial, and NVIDIA FLARE.

Both are CKKS with one key for all clients. Each is a pair of classes: the client makes the key, writes what its server
needs into a folder, encrypts and decrypts; the server adds and has no secret.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tenseal as ts  # type: ignore[import-untyped]

SERVER = "server.ctx"
DEGREE, SCALE = 8192, 2.0**40
LAYERS = (784 * 600, 600, 600 * 656, 656, 656 * 202, 202, 202 * 10, 10)  # an MLP of 1,000,000 parameters


def layers(size: int) -> list[slice]:
    """Return slices of a vector of `size` numbers, in the proportions of LAYERS."""
    whole = sum(LAYERS)
    return [slice(a * size // whole, b * size // whole) for a, b in pairwise(accumulate(LAYERS, initial=0))]


def write_blobs(blobs: Sequence[bytes]) -> bytes:
    """Join byte strings, each after its length."""
    return b"".join(struct.pack("<Q", len(blob)) + blob for blob in blobs)


def read_blobs(data: bytes) -> list[bytes]:
    """Read what `write_blobs` was given."""
    blobs, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        blobs.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return blobs


class NaiveClient:
    """A client with the tutorial's context, made for two multiplications, a public key, and all weights in one vector.

    Weights are multiplied by n_k / n before they are encrypted (TenSEAL, "Tutorial 2 - Working with Approximate
    Numbers": degree, primes and scale). There are no Galois keys, as nothing is rotated.
    """

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._context = ts.context(ts.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=[60, 40, 40, 60], n_threads=1)
        self._context.global_scale = SCALE
        (folder / SERVER).write_bytes(self._context.serialize(save_relin_keys=False))  # keeps the secret key out

    def protect(self, weights: np.ndarray, client: int, examples: int, reference: int) -> bytes:
        """Return the upload of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        return bytes(ts.ckks_vector(self._context, weights.astype(np.float64) * (examples / reference)).serialize())

    def open(self, download: bytes, clients: int, examples: int) -> np.ndarray:
        """Return the weighted mean, float64 [size]."""
        return np.asarray(ts.ckks_vector_from(self._context, download).decrypt())


class NaiveServer:
    """A server that adds uploads as they come."""

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._context = ts.context_from((folder / SERVER).read_bytes(), n_threads=1)
        self._sum: Any = None

    def add(self, upload: bytes, client: int, examples: int, reference: int) -> None:
        """Load an upload and add it."""
        self._take(ts.ckks_vector_from(self._context, upload))

    def _take(self, vector: Any) -> None:
        self._sum = vector if self._sum is None else self._sum.add_(vector)

    def total(self) -> bytes:
        """Return what clients download."""
        return bytes(self._sum.serialize())


class HoldingServer(NaiveServer):
    """A server that also keeps every ciphertext, as one that is handed a list of replies: to measure its memory."""

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        super().__init__(folder, size, clients)
        self._held: list[Any] = []

    def _take(self, vector: Any) -> None:
        super()._take(vector)
        self._held.append(vector)


class FlareClient:
    """A client with one vector for each layer, symmetric encryption, and one prime for the server's multiplication.

    NVIDIA FLARE, nvflare/app_opt/he/model_encryptor.py (`encryption`: weights times n_k, then a vector a
    layer) and nvflare/lighter/impl/he.py (the context).
    """

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._context = ts.context(
            ts.SCHEME_TYPE.CKKS,
            DEGREE,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
            n_threads=1,
        )
        self._context.global_scale = SCALE
        (folder / SERVER).write_bytes(self._context.serialize(save_public_key=False))

    def protect(self, weights: np.ndarray, client: int, examples: int, reference: int) -> bytes:
        """Return the upload of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        weighted = weights.astype(np.float64) * examples
        return write_blobs([ts.ckks_vector(self._context, weighted[part]).serialize() for part in layers(len(weights))])

    def open(self, download: bytes, clients: int, examples: int) -> np.ndarray:
        """Return the weighted mean, float64 [size]."""
        return np.concatenate([ts.ckks_vector_from(self._context, blob).decrypt() for blob in read_blobs(download)])


class FlareServer:
    """A server that adds uploads as they come, then multiplies once by 1 / n.

    NVIDIA FLARE, nvflare/app_opt/he/intime_accumulate_model_aggregator.py (`accept` and `aggregate`).
    """

    def __init__(self, folder: Path, size: int, clients: int) -> None:
        self._context = ts.context_from((folder / SERVER).read_bytes(), n_threads=1)
        self._sums: list[Any] = []
        self._examples = 0

    def add(self, upload: bytes, client: int, examples: int, reference: int) -> None:
        """Load an upload and add it to the sum of each layer."""
        vectors = [ts.ckks_vector_from(self._context, blob) for blob in read_blobs(upload)]
        self._examples += examples
        self._sums = [a + b for a, b in zip(self._sums, vectors, strict=True)] if self._sums else vectors

    def total(self) -> bytes:
        """Return what clients download."""
        return write_blobs([(total * (1 / self._examples)).serialize() for total in self._sums])
