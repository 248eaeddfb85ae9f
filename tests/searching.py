"""Search what a process holds for secrets: its memory, the files it has open or wrote, and what it was sent.

A run of at least `least` bytes of a secret, at whatever byte it starts in the secret and in the memory, covers
(least - 7) // 8 whole words of 8 bytes that the memory holds at multiples of 8. So every such word of the memory is looked
up among all 8-byte windows of the secrets, and where that many in a row are known, the bytes are compared. Nothing longer
is missed but a run whose words all are the same, as of zeros.
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
BITS = 24  # of the table that sorts out most words
KERNEL = ("[vvar", "[vsyscall]")  # pages of the kernel's own, which cannot be read from outside

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
        self._secrets = [np.frombuffer(secrets[name], np.uint8) for name in self._names]
        lengths = [len(secret) - WORD + 1 for secret in self._secrets]
        words = np.concatenate([_windows(secret) for secret in self._secrets])
        order = np.argsort(words, kind="stable")
        self._words = words[order]
        self._owner = np.repeat(np.arange(len(lengths)), lengths)[order]
        self._start = np.concatenate([np.arange(length) for length in lengths])[order]
        self._table = np.zeros(2**BITS, np.bool_)
        self._table[_hash(self._words)] = True

    def inside(self, places: Iterable[Place]) -> list[Found]:
        """All runs in some places, the longest where several overlap."""
        return [found for name, content in places for found in self._pieces(name, content)]

    def _pieces(self, place: str, content: bytes) -> Iterator[Found]:
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
        done = 0
        for at in np.flatnonzero(row):
            if at * WORD < done or (words[at : at + need] == words[at]).all():
                continue
            best = max(self._matches(data, int(at) * WORD), default=None)
            if best is None:
                continue
            length, owner, start, begin = best
            done = begin + length
            if not any(data[begin:done].tobytes() in known for known in self._known):
                yield Found(self._names[owner], start, length, f"{place} at byte {offset + begin}")

    def _matches(self, data: np.ndarray, at: int) -> Iterator[tuple[int, int, int, int]]:
        """Runs around the word at a byte of the data: length, which secret, from where in it, from where in the data."""
        word = data[at : at + WORD].view("<u8")[0]
        first, last = np.searchsorted(self._words, word, "left"), np.searchsorted(self._words, word, "right")
        for index in range(first, last):
            owner, start = int(self._owner[index]), int(self._start[index])
            secret = self._secrets[owner]
            before = _common(secret[:start][::-1], data[:at][::-1])
            length = before + _common(secret[start:], data[at:])
            if length >= self._least:
                yield length, owner, start - before, at - before


def _windows(secret: np.ndarray) -> np.ndarray:
    """The 8 bytes from each byte on, uint64 [n - 7]."""
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(secret, WORD)).view("<u8").reshape(-1)


def _hash(words: np.ndarray) -> np.ndarray:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - BITS)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many bytes at the start are the same."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def memory(process: int) -> Iterator[Place]:
    """Every region of a process's memory that can be read, and every file it has open, those without a name too.

    Raise PermissionError where this process may not look.
    """
    regions = Path(f"/proc/{process}/maps").read_text().splitlines()
    descriptor = os.open(f"/proc/{process}/mem", os.O_RDONLY)
    try:
        for line in regions:
            extent, mode, _, _, _, *name = line.split(maxsplit=5)
            if mode[0] != "r" or name and name[0].startswith(KERNEL):
                continue
            start, end = (int(number, 16) for number in extent.split("-"))
            yield f"memory {extent} {' '.join(name)}".rstrip(), _read(descriptor, start, end - start)
    finally:
        os.close(descriptor)
    for path in Path(f"/proc/{process}/fd").iterdir():
        if stat.S_ISREG(path.stat().st_mode):
            yield f"open file {path.readlink()}", path.read_bytes()


def _read(descriptor: int, start: int, length: int) -> bytes:
    pieces = []
    while length:
        pieces.append(os.pread(descriptor, min(length, 2**26), start))
        start, length = start + len(pieces[-1]), length - len(pieces[-1])
    return b"".join(pieces)


def files(folder: Path) -> Iterator[Place]:
    """The files below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"file {path.relative_to(folder)}", path.read_bytes()


def can_read_memory(process: int) -> bool:
    """Whether the system lets this process look into another of its own."""
    try:
        os.close(os.open(f"/proc/{process}/mem", os.O_RDONLY))
    except OSError:
        return False
    return True
