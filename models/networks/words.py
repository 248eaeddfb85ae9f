"""Word vectors: the table of word vectors in text networks, and the rows of it that a client uses.

A client's texts use few of a vocabulary's words, and the gradient is zero in all other rows. Training only the rows
in use gives the same weights, at a cost that does not grow with the vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

PADDING = 0


class Words(nn.Embedding):
    """A vector for each word id, int64 [n, t] -> float [n, t, size]; the row of padding (0) is not trained.

    `own_rows` relies on this: the network uses ids only to select rows of this table, and to recognise padding. A
    network that also multiplies by the whole table, as with tied output weights, must use `nn.Embedding`. Word vectors
    start as N(0, 1), that of padding as zero.
    """

    def __init__(self, vocabulary_size: int, size: int) -> None:
        super().__init__(vocabulary_size, size, padding_idx=PADDING)


class PooledWords(Words):
    """The mean or the sum of a text's word vectors, int64 [n, t] -> float [n, size]; zero for a text without words."""

    def __init__(self, vocabulary_size: int, size: int, pooling: str) -> None:
        super().__init__(vocabulary_size, size)
        self.pooling = pooling

    def forward(self, ids: Tensor) -> Tensor:
        """Pool the vectors of the words that are not padding."""
        ids = trim(ids)
        vectors = super().forward(ids)  # [n, t, size]
        return pool(vectors, ids, self.pooling)


def pool(vectors: Tensor, ids: Tensor, pooling: str) -> Tensor:
    """Return the `sum`, `mean`, or `last` of the vectors [n, t, size] whose `ids` [n, t] are not padding: [n, size]."""
    real = ids != PADDING  # [n, t]
    if pooling == "last":
        end = real.sum(dim=1, keepdim=True).sub(1).clamp(min=0)  # [n, 1]
        vectors = vectors.take_along_dim(end.unsqueeze(-1), dim=1)  # [n, 1, size]
        real = real.take_along_dim(end, dim=1)
    total = (vectors * real.unsqueeze(-1)).sum(dim=1)  # [n, size]
    return total / real.sum(dim=1, keepdim=True).clamp(min=1) if pooling == "mean" else total


def trim(ids: Tensor) -> Tensor:
    """Cut off the columns at the end of `ids` [n, t] that are padding in every text; at least one column stays."""
    longest = int((ids != PADDING).sum(dim=1).max())
    return ids[:, : max(longest, 1)]


def tables(network: nn.Module) -> dict[str, Tensor]:
    """Return the word tables of `network` by parameter name."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, Words)
    }


def own_rows(ids: np.ndarray, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a word table that `ids` [n, t] use, and `ids` as indices into them, int64 [n, t].

    The rows are int64 [u], ascending, padding included.
    """
    used = np.zeros(vocabulary_size, dtype=bool)
    used[ids] = True
    used[PADDING] = True
    rows = np.flatnonzero(used)
    place = np.zeros(vocabulary_size, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    return rows, place[ids]
