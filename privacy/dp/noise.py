"""Clipping and Gaussian noise, which bound how much an update, or a sum of updates, can tell of one client.

A client's update is its weights after training less those before, all tensors as one vector u. It is shortened to
u min(1, C / |u|) (Abadi et al. 2016, algorithm 1; McMahan et al. 2018, section 2: of a whole client). Noise of standard
deviation sigma = z C is added to each number of one client's update, or of the sum of a cohort's. Clipping alone hides
nothing; `privacy/dp/accounting/guarantee.py` says what both together hide.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

Update = dict[str, np.ndarray]
Normal = Callable[[int], np.ndarray]  # size -> standard normal numbers, float64 [size]

_FRACTION = 2.0**-53  # the distance of neighbouring uniform numbers


def norm(update: Mapping[str, np.ndarray]) -> float:
    """Return |u|, the L2 norm of all tensors as one vector, in float64."""
    with np.errstate(over="ignore"):  # overflow gives inf
        return math.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in update.values()))


def clip(update: Mapping[str, np.ndarray], bound: float) -> Update:
    """Return u min(1, C / |u|), float64; all zeros where u is not finite, because its norm cannot be bounded.

    bound: C
    """
    length = norm(update)
    if not math.isfinite(length):
        return {name: np.zeros(value.shape) for name, value in update.items()}
    factor = min(1.0, bound / length) if length else 1.0
    return {name: np.asarray(value, np.float64) * factor for name, value in update.items()}


class Updates:
    """The updates of clients that began with one model, one after another in one vector, float64: a pass for each step."""

    def __init__(self, given: Mapping[str, np.ndarray]) -> None:
        """`given`: the model, float32 by name."""
        self._given = given
        self.before = np.concatenate([np.asarray(value, np.float64).reshape(-1) for value in given.values()])
        self.update = np.empty(self.before.size)

    def read(self, weights: Mapping[str, np.ndarray]) -> float:
        """Put weights - given into `update`, and return its L2 norm."""
        for name, piece in self._pieces():
            piece[...] = weights[name].reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):  # the norm shows what is not finite
            self.update -= self.before
            return math.sqrt(np.dot(self.update, self.update))

    def write(self, weights: Mapping[str, np.ndarray]) -> None:
        """Put given + update into arrays of weights."""
        self.update += self.before
        for name, piece in self._pieces():
            weights[name][...] = piece.reshape(weights[name].shape)

    def _pieces(self) -> Iterator[tuple[str, np.ndarray]]:
        start = 0
        for name, value in self._given.items():
            yield name, self.update[start : start + value.size]
            start += value.size


def clip_rows(given: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], bound: float) -> np.ndarray:
    """Clip the updates of K clients in place, as `clip` does, and return their norms before, float64 [K].

    given: the model that all were sent, float32 by name; rows: their weights, each [K, ...]; bound: C
    """
    updates, clients = Updates(given), len(next(iter(rows.values())))
    lengths = np.empty(clients)
    for k in range(clients):
        weights = {name: value[k] for name, value in rows.items()}
        lengths[k] = length = updates.read(weights)
        if length <= bound:
            continue
        if math.isfinite(length):
            updates.update *= bound / length
        else:
            updates.update[:] = 0
        updates.write(weights)
    return lengths


def add_noise(update: Mapping[str, np.ndarray], deviation: float, normal: Normal) -> Update:
    """Return u + N(0, deviation^2) in each number, float64; `normal` draws for the tensors in their order."""
    return {
        name: np.asarray(value, np.float64) + deviation * normal(value.size).reshape(value.shape)
        for name, value in update.items()
    }


def secret_normal(size: int) -> np.ndarray:
    """Draw standard normal numbers, float64 [size], from the operating system's generator: nobody can repeat them."""
    return _normal(os.urandom(_bytes_for(size)), size)


def keyed_normal(key: bytes, number: int, size: int) -> np.ndarray:
    """Return standard normal numbers, float64 [size], that a secret key of 32 bytes decides for each `number`.

    They are made of ChaCha20's stream (RFC 8439) with `number` as the nonce: who has the key can make them again.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(4) + number.to_bytes(12, "little")), None).encryptor()
    return _normal(stream.update(bytes(_bytes_for(size))), size)


def _bytes_for(size: int) -> int:
    return 16 * ((size + 1) // 2)


def _normal(random: bytes, size: int) -> np.ndarray:
    """Make standard normal numbers of random bytes.

    Box and Muller (1958): sqrt(-2 ln u) cos(2 pi v) and sin, of uniform u in (0, 1] and v in [0, 1) of 53 bits each.
    """
    pairs = (size + 1) // 2
    bits = np.frombuffer(random, np.uint64) >> 11
    radius = np.sqrt(-2 * np.log((bits[:pairs] + 1) * _FRACTION))
    angle = bits[pairs:] * (2 * np.pi * _FRACTION)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def secret_uniform(size: int) -> np.ndarray:
    """Draw uniform numbers in [0, 1), float64 [size], from the operating system's generator."""
    return (np.frombuffer(os.urandom(8 * size), np.uint64) >> 11) * _FRACTION
