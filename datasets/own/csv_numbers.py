"""The fast way through a plain CSV file of numbers, by pandas; where a file is not plain, the slow way reads it."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fedveil.datasets.own.table import Header, Table
from fedveil.datasets.own.text_file import is_utf_8, unpacked

ROWS = 1 << 14  # read at once
LARGEST = float(np.finfo(np.float32).max)


class _Counted(io.RawIOBase):
    """A stream of bytes that counts the separators that were read, and notes what the fast way cannot read."""

    def __init__(self, stream: io.BufferedReader, separator: str) -> None:
        self._stream, self._separator = stream, ord(separator)
        self.separators, self.plain = 0, True

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        block = self._stream.read(size)
        self.separators += int(np.count_nonzero(np.frombuffer(block, np.uint8) == self._separator))
        self.plain = self.plain and b'"' not in block and b"\0" not in block
        return block


def read_fast(path: Path, encoding: str | None, header: Header) -> Table | None:
    """Read numbers, labels and sources as `read_csv` does, or return None where a row is not plain.

    Plain is a row with as many values as columns, no quotes, and no value that is empty, a word or not finite. Numbers
    are the same to the bit: both ways round a decimal to the nearest float64.
    """
    import pandas as pd

    width = header.width
    words = [i for i in (header.label, header.source) if i is not None]
    columns = sorted([*words, *header.take])
    if width != len(header.names) or not header.separator.isascii() or not is_utf_8(path, encoding):
        return None
    # from pandas 3.1 on, rounding to the nearest is all it does, and the option gives a warning
    exact: dict[str, Any] = {} if _version(pd) >= (3, 1) else {"float_precision": "round_trip"}
    found: dict[int, list[str]] = {i: [] for i in words}
    blocks: list[np.ndarray] = []
    with unpacked(path) as stream:
        above = b"".join(stream.readline() for _ in range(header.line))
        if above.count(b"\r") != above.count(b"\r\n") or above.count(b'"') % 2:
            return None  # lines that end as on old Macs, or a name of several lines
        counted = _Counted(stream, header.separator)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                reader = pd.read_csv(
                    counted, sep=header.separator, header=None, names=range(width), usecols=columns, index_col=False,
                    dtype={i: object if i in words else np.float64 for i in columns}, na_filter=False,
                    quoting=csv.QUOTE_NONE, skip_blank_lines=False, chunksize=ROWS, engine="c", **exact,
                )  # fmt: skip
                for frame in reader:
                    numbers = frame[list(header.take)].to_numpy(np.float64)
                    if not counted.plain or not (numbers.min() >= -LARGEST and numbers.max() <= LARGEST):  # nor NaN
                        return None
                    blocks.append(numbers)
                    for i in words:
                        found[i] += map(str.strip, frame[i].tolist())
        except (ValueError, pd.errors.ParserError, Warning):
            return None  # the slow way says what is wrong, and where
    rows = sum(map(len, blocks))
    if not rows or not counted.plain or counted.separators != rows * (width - 1):
        return None
    if not all(map(all, found.values())):  # a label or source is empty
        return None
    first = header.line + 1
    return Table(
        "features",
        found[header.label],
        lambda i: f"{path}, line {first + i}",
        features=np.concatenate(blocks),
        columns=header.columns,
        sources=None if header.source is None else found[header.source],
    )


def _version(pandas: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in pandas.__version__.split(".")[:2])
