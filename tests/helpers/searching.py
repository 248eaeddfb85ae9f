"""Search what a process holds for secrets: its memory, the files it has open or wrote, and what it was sent.

A run of at least `least` bytes of a secret, at whatever byte it starts in the secret and in the memory, covers
(least - 7) // 8 whole words of 8 bytes that the memory holds at multiples of 8. So every such word of the memory is looked
up among all 8-byte windows of the secrets, and where that many in a row are known, the bytes are compared. None is
missed; only what says nothing is passed over: fewer than 8 different bytes, or one word again and again, as of zeros.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORD = 8  # bytes
PIECE = 2**22  # bytes searched at once
DISTINCT = 8  # different bytes in a run that says something
CHANCE = 4  # bytes at either end of what everybody knows may be those of a secret by chance
BITS = 24  # of the table that sorts out most words
KERNEL = ("[vvar", "[vsyscall]")  # pages of the kernel's own, which cannot be read from outside

Match = tuple[int, int, int, int]  # bytes, which secret, from which byte of it, from which byte of the data
NOTHING: Match = 0, 0, 0, 0
Place = tuple[str, bytes]  # where bytes lie, and the bytes


@dataclass(frozen=True)
class Found:
    """A run of a secret: which, from which byte of it, how many bytes, and where it lies."""

    secret: str
    start: int
    length: int
    place: str


class Search:
    """Looks for runs of at least `least` bytes of any secret."""

    def __init__(self, secrets: Mapping[str, bytes], known: Iterable[bytes] = (), least: int = 64) -> None:
        """`known`: what everybody may hold; runs that lie in it too are passed over."""
        self._known, self._least = list(known), least
        self._names = [name for name, secret in secrets.items() if len(secret) >= least]
        self._raw = [secrets[name] for name in self._names]
        self._secrets = [np.frombuffer(secret, np.uint8) for secret in self._raw]
        lengths = [len(secret) - WORD + 1 for secret in self._secrets]
        words = np.concatenate([_windows(secret) for secret in self._secrets])
        order = np.argsort(words, kind="stable")
        self._words = words[order]
        self._owner = np.repeat(np.arange(len(lengths)), lengths)[order]
        self._start = np.concatenate([np.arange(length) for length in lengths])[order]
        self._table = np.zeros(2**BITS, np.bool_)
        self._table[_hash(self._words)] = True

    def inside(self, place: str, content: bytes) -> Iterator[Found]:
        """All runs in some bytes, the longest where several overlap; `place`: where they lie."""
        overlap = -(-self._least // WORD) * WORD
        for start in range(0, len(content), PIECE):
            piece = np.frombuffer(content, np.uint8)[start : start + PIECE + overlap]
            yield from self._piece(place, start, piece)

    def _piece(self, place: str, offset: int, data: np.ndarray) -> Iterator[Found]:
        need = (self._least - WORD + 1) // WORD
        words = data[: len(data) // WORD * WORD].view("<u8")
        if len(words) < need:
            return
        hits = self._table[_hash(words)]
        count = len(words) - need + 1
        row = hits[:count].copy()
        for step in range(1, need):
            row &= hits[step : step + count]
        if row.any():
            changes, some = words[1:] != words[:-1], np.zeros(count, np.bool_)
            for step in range(need - 1):
                some |= changes[step : step + count]
            row &= some
        done = 0
        for at in np.flatnonzero(row):
            # all that a run of `least` bytes with these words may hold
            reach = data[max(at - 1, 0) * WORD : (at + need + 1) * WORD].tobytes()
            if at * WORD < done or len(set(reach)) < DISTINCT:
                continue
            run = words[at : at + need]
            first, last = np.searchsorted(self._words, run, "left"), np.searchsorted(self._words, run, "right")
            rarest = int(np.argmin(last - first))
            where = self._same(range(first[rarest], last[rarest]), WORD * rarest, run.tobytes())
            best = max((self._around(owner, start, data, int(at) * WORD) for owner, start in where), default=NOTHING)
            length, owner, start, begin = best
            if length < self._least or len(np.unique(data[begin : begin + length])) < DISTINCT:
                continue
            done = begin + length
            inner = data[begin + CHANCE : done - CHANCE].tobytes()
            if not any(inner in known for known in self._known):
                yield Found(self._names[owner], start, length, f"{place} at byte {offset + begin}")

    def _same(self, windows: range, before: int, content: bytes) -> Iterator[tuple[int, int]]:
        """Which secret holds this content, and from which byte on, with one of some windows so many bytes after it starts."""
        for index in windows:
            owner, start = int(self._owner[index]), int(self._start[index]) - before
            if start >= 0 and self._raw[owner][start : start + len(content)] == content:
                yield owner, start

    def _around(self, owner: int, start: int, data: np.ndarray, at: int) -> Match:
        """The whole run of which this byte of a secret and this byte of the data are."""
        secret = self._secrets[owner]
        before = _common(secret[:start][::-1], data[:at][::-1])
        return before + _common(secret[start:], data[at:]), owner, start - before, at - before


def _windows(secret: np.ndarray) -> np.ndarray:
    """The 8 bytes from each byte on, uint64 [n - 7]."""
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(secret, WORD)).view("<u8").reshape(-1)


def _hash(words: np.ndarray) -> np.ndarray:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - BITS)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many bytes at the start are the same."""
    length, size = 0, WORD
    while True:
        some, others = one[length : length + size], other[length : length + size]
        differs = np.flatnonzero(some[: len(others)] != others[: len(some)])
        if len(differs) or len(some) < size or len(others) < size:
            return length + (int(differs[0]) if len(differs) else min(len(some), len(others)))
        length, size = length + size, 2 * size


def memory(process: int) -> Iterator[Place]:
    """What can be read of a process's memory, and every file it has open, those without a name too.

    Left out are mapped files that were there before the process and of which it changed no page: code, most of all.
    Raise PermissionError where this process may not look.
    """
    began = Path(f"/proc/{process}").stat().st_mtime
    descriptor = os.open(f"/proc/{process}/mem", os.O_RDONLY)
    try:
        for line, sizes in _regions(process):
            extent, mode, _, _, node, *name = line.split(maxsplit=5)
            if mode[0] != "r" or (name and name[0].startswith(KERNEL)):
                continue
            untouched = mode[3] == "p" and node != "0" and not sizes["Anonymous"] and not sizes["Swap"]
            if untouched and Path(name[0]).exists() and Path(name[0]).stat().st_mtime < began:
                continue
            start, end = (int(number, 16) for number in extent.split("-"))
            yield f"memory {extent} {' '.join(name)}".rstrip(), _read(descriptor, start, end - start)
    finally:
        os.close(descriptor)
    for path in Path(f"/proc/{process}/fd").iterdir():
        if stat.S_ISREG(path.stat().st_mode):
            yield f"open file {path.readlink()}", path.read_bytes()


def _regions(process: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The regions of a process's memory: the line that says where, and sizes in kB by name."""
    line, sizes = "", {}
    for text in Path(f"/proc/{process}/smaps").read_text().splitlines():
        word, *rest = text.split()
        if not word.endswith(":"):
            line, sizes = text, {}
        elif word == "VmFlags:":  # the last of a region
            yield line, sizes
        elif rest[-1] == "kB":
            sizes[word[:-1]] = int(rest[0])


def _read(descriptor: int, start: int, length: int) -> bytes:
    pieces = []
    while length:
        pieces.append(os.pread(descriptor, min(length, 2**30), start))
        start, length = start + len(pieces[-1]), length - len(pieces[-1])
    return b"".join(pieces)


def files(folder: Path) -> Iterator[Place]:
    """The files below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"file {path.relative_to(folder)}", path.read_bytes()


def can_read_memory(process: int) -> bool:
    """Whether the system lets this process look into another of its own, which stands still."""
    try:
        next(memory(process))
    except OSError:
        return False
    return True
