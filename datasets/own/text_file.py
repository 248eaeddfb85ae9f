"""A user's text file as a stream of text: unpacked where it is compressed, and decoded by its mark or the settings."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedveil.core.errors import DataError, SettingsError

# how a compressed file begins, whatever it is called, and what opens it
PACKED: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (rb"\x1f\x8b\x08", gzip.open),
    (rb"BZh[1-9]1AY&SY", bz2.open),
    (rb"\xfd7zXZ\x00", lzma.open),
)
# a byte order mark, and the encoding that it is the mark of; the longer ones first
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WIDE = re.compile("utf[-_]?(16|32)", re.IGNORECASE)  # encodings in which a line break is more than one byte


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file's bytes, those within where gzip, bzip2 or xz packed it; raise DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
        unpack = next((unpack for mark, unpack in PACKED if re.match(mark, start)), None)
        with path.open("rb") if unpack is None else io.BufferedReader(unpack(path)) as opened:
            yield opened
    except (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}; is it whole?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def decoded(path: Path, encoding: str | None) -> Iterator[io.TextIOWrapper]:
    """Open a file's text, line breaks as they are.

    encoding: its name; without one it is that of the file's byte order mark, and UTF-8 where it has none
    Raise DataError that names the line which is not in the encoding; SettingsError where there is no such encoding.
    """
    with unpacked(path) as raw:
        chosen = _encoding(path, raw.peek(4)[:4], encoding)
        try:
            yield io.TextIOWrapper(raw, chosen, newline="")
        except UnicodeError as error:
            raise DataError(f"{path}{_undecodable(path, chosen)}: not {chosen.removesuffix('-sig').upper()} text: "
                            f"{_reason(error)}; {_advice(encoding)}") from None  # fmt: skip


def is_utf_8(path: Path, encoding: str | None) -> bool:
    """Say whether `decoded` reads a file as UTF-8; raise what it raises."""
    with unpacked(path) as raw:
        return _encoding(path, raw.peek(4)[:4], encoding) in ("utf-8", "utf-8-sig")


def _encoding(path: Path, start: bytes, encoding: str | None) -> str:
    """Return the encoding of a text that begins with these bytes."""
    marked = next((name for mark, name in MARKS if start.startswith(mark)), None)
    if encoding is None:
        zeros = [i for i, byte in enumerate(start) if not byte]
        if marked is None and zeros in ([1, 3], [0, 2]):
            raise DataError(
                f"{path}: every second byte is zero, as in UTF-16, whose mark it lacks; set data.encoding = "
                f"'utf-16-{'le' if zeros[0] else 'be'}'"
            )
        return marked or "utf-8"
    try:
        known = codecs.lookup(encoding)
        "".encode(encoding)  # refuses codecs that are not of text, as hex is not
    except (LookupError, ValueError):
        raise SettingsError(
            f"data.encoding = {encoding!r}: no encoding has this name; utf-8, utf-16, cp1252 (Western Europe), cp1251 "
            "(Cyrillic), shift_jis and gb18030 are some"
        ) from None
    if marked is None:
        return known.name
    if known.name.replace("_", "-").removesuffix("-sig")[:6] != marked[:6]:
        raise DataError(
            f"{path}: begins with the mark of {marked.removesuffix('-sig').upper()}, and data.encoding = {encoding!r}; leave "
            "data.encoding out"
        )
    return marked


def _undecodable(path: Path, encoding: str) -> str:
    """Return `", line N"` for the first line that is not in the encoding, where lines can be told before decoding."""
    if WIDE.match(encoding):
        return ""
    with unpacked(path) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return f", line {number}"
    return ""


def _reason(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError) and error.start < len(error.object):
        return f"byte 0x{error.object[error.start]:02x} ({error.reason})"
    return str(error)


def _advice(encoding: str | None) -> str:
    if encoding is not None:
        return "name the encoding that the file was saved in, or leave data.encoding out"
    return (
        "save it as UTF-8, or name its encoding, as in data.encoding = 'cp1252' (Excel and Windows in Western Europe)"
    )
