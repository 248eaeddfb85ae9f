"""The halves of fresh ciphertexts that travel as seeds, expanded for those who need their coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tenseal  # type: ignore[import-untyped]

from fedveil.privacy.homomorphic.seal import Ring, before_seed, read_ciphertext, read_vector, write_vector


class SeedExpander:
    """Expansion of seeds by TenSEAL, which expands them as it reads ciphertexts that hold nothing but a seed."""

    def __init__(self, context: Any, ring: Ring, scale_bits: int, version: tuple[int, int]) -> None:
        """`context`: TenSEAL's, of the ring; scale_bits: 0 for BFV; version: of SEAL."""
        self._context, self._ring, self._scale_bits = context, ring, scale_bits
        self._before = before_seed(ring, scale_bits, version)

    def expand(self, seeds: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the sums of polynomials, uint64 [N] each, that the seeds of several clients stand for.

        seeds: of each client, uint8 [chunks, SEED]; several chunks in one vector, which saves most of the time
        """
        ckks, total = self._ring.scheme == "ckks", None
        read = tenseal.ckks_vector_from if ckks else tenseal.bfv_vector_from
        slots = self._ring.degree // 2 if ckks else self._ring.degree
        for own in seeds:
            ciphertexts = [self._before + seed.tobytes() for seed in own]
            vector = read(self._context, write_vector(ciphertexts, slots, self._scale_bits))
            total = vector if total is None else total.add_(vector)
        assert total is not None  # somebody's seeds
        for blob in read_vector(total.serialize()):
            yield read_ciphertext(blob, self._ring).coefficients[1]
