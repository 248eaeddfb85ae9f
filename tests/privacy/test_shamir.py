"""Shamir's sharing: any `threshold` shares give the secret, fewer say nothing about it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg.shamir import PRIME, SECRET, SHARE, combine, split

secrets_of_32 = st.one_of(
    st.binary(min_size=SECRET, max_size=SECRET), st.sampled_from([bytes(SECRET), b"\xff" * SECRET])
)


def at(points: dict[int, int], x: int) -> int:
    """The polynomial through points, at x: Lagrange, written out."""
    total = 0
    for i, y in points.items():
        term = y
        for j in points:
            if j != i:
                term = term * (x - j) * pow(i - j, PRIME - 2, PRIME) % PRIME
        total += term
    return total % PRIME


def number(share: bytes) -> int:
    return int.from_bytes(share, "big")


def test_the_field_is_a_field_and_holds_every_secret() -> None:
    assert PRIME > 2 ** (8 * SECRET)
    assert PRIME < 2 ** (8 * SHARE)
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 40):  # Miller and Rabin
        power = pow(base, odd, PRIME)
        assert power in (1, PRIME - 1) or any(pow(power, 2**k, PRIME) == PRIME - 1 for k in range(1, twos))


@settings(max_examples=60, deadline=None)
@given(secrets_of_32, st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    holders = data.draw(st.integers(1, 30))
    threshold = data.draw(st.integers(1, holders))
    shares = split(secret, holders, threshold)
    assert [len(share) for share in shares] == [SHARE] * holders
    chosen = data.draw(st.sets(st.integers(1, holders), min_size=threshold))
    assert combine({point: shares[point - 1] for point in chosen}, threshold) == secret
    exact = {point: number(shares[point - 1]) for point in sorted(chosen)[-threshold:]}
    assert at(exact, 0) == number(secret)


@settings(max_examples=40, deadline=None)
@given(secrets_of_32, secrets_of_32, st.integers(2, 12))
def test_one_share_too_few_fits_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    shares = split(secret, threshold, threshold)
    known = dict(enumerate(shares[:-1], 1))
    with pytest.raises(ProtectionError, match=f"{threshold - 1} shares of a secret that takes {threshold}"):
        combine(known, threshold)
    missing = at({0: number(other)} | {point: number(share) for point, share in known.items()}, threshold)
    assert combine(known | {threshold: missing.to_bytes(SHARE, "big")}, threshold) == other


def test_shares_below_the_threshold_are_uniform_whatever_the_secret() -> None:
    drawn = [split(bytes(SECRET), 2, 3) for _ in range(4000)]
    for point in range(2):
        low = np.frombuffer(b"".join(shares[point][1:] for shares in drawn), np.uint8)
        counts = np.bincount(low, minlength=256)
        expected = len(low) / 256
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-10, 255)


def test_a_secret_is_never_shared_the_same_way_twice() -> None:
    secret = os.urandom(SECRET)
    assert not set(split(secret, 5, 3)) & set(split(secret, 5, 3))


def test_shares_of_different_secrets_or_out_of_range_are_refused_or_give_another_secret() -> None:
    one, other = split(bytes(SECRET), 3, 3), split(bytes(SECRET), 3, 3)
    mixed = {1: one[0], 2: other[1], 3: one[2]}
    assert combine(mixed, 3) != bytes(SECRET)
    with pytest.raises(ProtectionError, match="out of range"):
        combine({1: one[0], 2: one[1], 3: b"\xff" * SHARE}, 3)
    beyond = (PRIME - 1).to_bytes(SHARE, "big")  # a constant polynomial, whose value no secret of 32 bytes is
    with pytest.raises(ProtectionError, match="do not belong together"):
        combine({1: beyond, 2: beyond, 3: beyond}, 3)
