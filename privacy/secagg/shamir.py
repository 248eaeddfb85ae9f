"""Shamir's secret sharing: any `threshold` holders can restore a secret of 32 bytes, fewer know nothing of it.

A share is the value of a random polynomial over a prime field at 1, 2, ..., with the secret at 0 (Shamir 1979, "How to
share a secret").
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedveil.core.errors import ProtectionError

PRIME = 2**256 + 297  # the smallest prime above every secret of 32 bytes
SECRET = 32  # bytes
SHARE = 33  # bytes


def split(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """Return the shares of a secret at 1, ..., holders, SHARE bytes each, with the operating system's randomness.

    secret: SECRET bytes; threshold: how many shares restore it, 1 <= threshold <= holders
    """
    falling = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    falling.append(int.from_bytes(secret, "big"))
    return [_value(falling, point).to_bytes(SHARE, "big") for point in range(1, holders + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Restore the secret of at least `threshold` shares by their points; raise ProtectionError where they give none.

    Lagrange's interpolation at 0, of the `threshold` lowest points. Changed shares give another secret, or none.
    """
    if len(shares) < threshold:
        raise ProtectionError(f"{len(shares)} shares of a secret that takes {threshold}")
    points = tuple(sorted(shares)[:threshold])
    values = [int.from_bytes(shares[point], "big") for point in points]
    if max(values) >= PRIME:
        raise ProtectionError("a share of a secret is out of range")
    secret = sum(map(int.__mul__, values, _weights(points))) % PRIME
    if secret >= 2 ** (8 * SECRET):
        raise ProtectionError("the shares of a secret do not belong together")
    return secret.to_bytes(SECRET, "big")


def _value(falling: list[int], point: int) -> int:
    """Return a polynomial's value at a point, from coefficients of falling powers (Horner).

    Points are small, so one reduction is enough.
    """
    value = 0
    for coefficient in falling:
        value = value * point + coefficient
    return value % PRIME


@lru_cache(maxsize=64)  # on the complete graph every secret has the same holders
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the weight of each point's value in the value at 0."""
    product = math.prod(points)
    below = (point * math.prod(other - point for other in points if other != point) for point in points)
    return tuple(product * pow(divisor, -1, PRIME) % PRIME for divisor in below)
