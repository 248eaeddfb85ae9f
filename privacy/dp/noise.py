"""Clipping and Gaussian noise, which bound how much an update, or a sum of updates, can tell of one client.

A client's update is its weights after training less those before, all tensors as one vector u. It is shortened to
u min(1, C / |u|) (Abadi et al. 2016, algorithm 1; McMahan et al. 2018, section 2: of a whole client). Noise of standard
deviation sigma = z C is added to each number of one client's update, or of the sum of a cohort's. Clipping alone hides
nothing; `privacy/dp/accounting/guarantee.py` says what both together hide.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

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
