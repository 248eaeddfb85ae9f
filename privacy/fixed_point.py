"""Weights as whole numbers on a public grid, and back: the numbers that every protection adds.

A client sends q_k = round(clip(w_k) * n_k / n_ref / step). The sum of q_k is the next model up to a known factor:
sum_k n_k w_k / sum_k n_k = step * sum_k q_k / (sum_k n_k / n_ref). It depends on the clients' weights alone, as long as
the noise of an encryption is less than half a step. The published model then tells no more than the plain one
(Li and Micciancio 2021, section 1: a published result must not hold the noise of an encryption).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from fedveil.core.errors import ProtectionError

Parameters = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """The names and shapes of the tensors that a vector of weights is made of, in order."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, np.ndarray]) -> Layout:
        """Return the layout of parameters by name, in their order."""
        return cls(tuple((name, tuple(value.shape)) for name, value in parameters.items()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each tensor."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for _, shape in self.shapes)

    @property
    def size(self) -> int:
        """Numbers in the whole vector."""
        return sum(self.sizes)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ where names, order or shapes do."""
        return sha256(repr(self.shapes).encode()).digest()[:16]

    def tensor_at(self, position: int) -> str:
        """Return the name of the tensor that a position of the vector belongs to."""
        ends = np.cumsum(self.sizes)
        return self.shapes[int(np.searchsorted(ends, position, side="right"))][0]


@dataclass(frozen=True)
class Grid:
    """The public grid that weights are rounded to: multiples of 2^-bits.

    limit: the largest absolute value of a client's weights; noise: how far the mean of clients' noise may go beyond it
    """

    limit: float
    bits: int
    noise: float = 0.0

    @property
    def step(self) -> float:
        """The distance of neighbouring numbers, 2^-bits."""
        return float(2.0**-self.bits)

    @property
    def largest(self) -> float:
        """The largest absolute value of a mean."""
        return self.limit + self.noise

    @property
    def most(self) -> int:
        """The largest mean in steps. No sum of examples may be larger, because counts travel in steps too."""
        return int(self.largest / self.step)


def flatten(parameters: Mapping[str, np.ndarray], dtype: type = np.float32) -> np.ndarray:
    """Join all tensors into one vector: float32 [size], or of another type."""
    return np.concatenate([np.asarray(value, dtype).reshape(-1) for value in parameters.values()])


def unflatten(vector: np.ndarray, layout: Layout) -> Parameters:
    """Split a vector [layout.size] into its tensors, as views of it."""
    pieces = np.split(vector, np.cumsum(layout.sizes)[:-1])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(layout.shapes, pieces, strict=True)}


def quantize(
    vector: np.ndarray, examples: int, reference: int, grid: Grid, layout: Layout, noise: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Return round((clip(w) + noise) * examples / reference / step), int64 [size], and how many numbers were clipped.

    vector: float32 or float64 [size]; examples: n_k; reference: n_ref, the announced total of the cohort
    noise: float64 [size]. It comes after the clip, which would swallow it where weights lie at the edge of the range.
    Raise ProtectionError, naming the tensor, where a number is not finite; and where `examples` is not within 1 and
    `reference`.
    """
    if not 0 < examples <= reference:
        raise ProtectionError(
            f"{examples:,} training examples are no share of the {reference:,} that the server announced for the cohort"
        )
    wide = vector.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    if not np.isfinite(largest):
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ProtectionError(f"{layout.tensor_at(bad)} holds a number that is not finite ({vector[bad]})")
    clipped = 0
    if largest > grid.limit:
        clipped = int(np.count_nonzero(np.abs(wide) > grid.limit))
        np.clip(wide, -grid.limit, grid.limit, out=wide)
    if noise is not None:
        wide += noise
    wide *= examples / reference / grid.step
    return np.rint(wide, out=wide).astype(np.int64), clipped


def dequantize(total: np.ndarray, examples: int, reference: int, grid: Grid, dtype: type = np.float32) -> np.ndarray:
    """Return the weighted mean behind a sum: step * total / (examples / reference), float32 [size], or of another type.

    total: whole numbers [size], the sum of what `quantize` gave; examples: the sum of n_k of the clients in it
    """
    return np.asarray(total * (grid.step / (examples / reference)), dtype)
