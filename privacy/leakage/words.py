"""Words, read from the rows of a word table: a row that changed is of a word that was trained on.

The gradient of a row is zero where no text of the batch holds its word (Trask 2019, "Grokking Deep Learning", chapter
15; Melis et al. 2019, "Exploiting Unintended Feature Leakage in Collaborative Learning", section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

PADDING = 0  # `text.PADDING`: its row is never trained
BLOCKS, LEAST, MOST_ALIKE = 50, 32, 256  # blocks of entries alike in size: how many, and the entries of one
ODD = 10.0  # times the usual scatter from the usual row; a row beyond has moved
SCATTER = 0.3  # least scatter of one entry's change: most of a table may change alike to the last bit
ROUNDING = 2  # steps of float32, times the root of the clients: how far a mean is off where nothing moved
MOST = 64  # times that one word is counted in one text
NEAR = 0.1  # distance within which a number counts as whole


def find(parameters: Mapping[str, np.ndarray], vocabulary_size: int) -> str | None:
    """Return the name of the word table, the first tensor with a row for each word; None where there is none."""
    for name, values in parameters.items():
        if values.ndim == 2 and len(values) >= vocabulary_size:
            return name
    return None


def moved(before: np.ndarray, change: np.ndarray, clients: int = 1) -> np.ndarray:
    """Return the words whose rows moved, int64 [m], ids rising; for a mean change, the words of all its clients.

    before: the rows, float32 [words, size]; change: float64 [words, size], of the rows in training, or their gradient;
    clients: of whom `change` is the mean

    Where some rows stand still, all others moved; in a mean of several clients, a change within the rounding of float32
    counts as none. Where all rows change (weight decay, noise, a coarser grid), those moved whose change is unusual for
    entries of their size; that takes a vocabulary of which most was not trained on.
    """
    rows, moves = before[1:].astype(np.float64), change[1:]  # padding, the first row, is no word
    stirs = moves != 0
    if clients > 1:
        reach = np.maximum(np.abs(rows), np.abs(rows + moves)).astype(np.float32)
        stirs = np.abs(moves) > (1 + ROUNDING * np.sqrt(clients)) * np.spacing(reach)
    found: np.ndarray = stirs.any(axis=1)
    return 1 + np.flatnonzero(_odd(rows, moves) if found.all() else found)


def _odd(rows: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Say which rows changed unlike others, bool [rows].

    Weight decay changes an entry by the same function of its value in every row: by a share of it, or, where Adam takes
    decay for a gradient, by nearly the same step whatever its size. Rounding and noise are as large in one row as in
    another. So the median change of entries alike in size is the change of an entry without a gradient, and the median
    distance from it is the precision of that estimate.
    """
    left = min((moves - _share(moves, along) * along for along in (rows, np.sign(rows))), key=_middle)
    size, shift = np.abs(rows).ravel(), (np.where(rows < 0, -1, 1) * left).ravel()
    width = min(max(len(size) // BLOCKS, LEAST), MOST_ALIKE, len(size))
    blocks = np.argsort(size, kind="stable")[: len(size) // width * width].reshape(-1, width)
    centers = np.median(size[blocks], axis=1)
    off = np.abs(shift - np.interp(size, centers, np.median(shift[blocks], axis=1)))
    spread = np.interp(size, centers, np.median(off[blocks], axis=1))
    spread = np.maximum(spread, np.spacing(size.astype(np.float32)) / 2)  # all of a block may change alike
    far = np.minimum(off / spread, ODD).reshape(rows.shape).mean(axis=1)  # one odd entry makes no odd row
    middle = np.median(far)
    scatter = max(float(np.median(np.abs(far - middle))), SCATTER / np.sqrt(rows.shape[1]))
    odd: np.ndarray = far > middle + ODD * scatter
    return odd


def _share(moves: np.ndarray, along: np.ndarray) -> float:
    """Return the median over rows of the best c for moves = c * along; 0 where `along` is zero."""
    energy = (along**2).sum(axis=1)
    rows = energy > 0
    return float(np.median((along * moves).sum(axis=1)[rows] / energy[rows])) if rows.any() else 0.0


def _middle(values: np.ndarray) -> float:
    return float(np.median(np.abs(values)))


def counts(change: np.ndarray) -> np.ndarray | None:
    """Return how often each word occurs in one text whose word vectors are added or averaged, int64 [m].

    change: float64 [m, size] of the rows that moved
    A row's change is its count times a vector that all words share, so the rows are whole multiples of one vector. The
    smallest counts that fit are given. They are right up to a common factor, which a mean hides and a sum does not show
    (a text whose every word occurs twice counts as one). None where the rows are no such multiples.
    """
    if len(change) == 0:
        return np.zeros(0, dtype=np.int64)
    length = np.linalg.norm(change, axis=1)
    direction = change[np.argmax(length)] / length.max()
    along = change @ direction
    if (along <= 0).any() or (np.linalg.norm(change - np.outer(along, direction), axis=1) > NEAR * along).any():
        return None
    for least in range(1, MOST + 1):  # how often the rarest word occurs
        multiples = along / along.min() * least
        if (np.abs(multiples - np.rint(multiples)) < NEAR / np.sqrt(least)).all() and multiples.max() <= MOST:
            return np.asarray(np.rint(multiples), np.int64)
    return None
