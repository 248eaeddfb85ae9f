"""Bringing published data here: receive it, take it out of its archive, store it whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from fedveil.core.errors import DataError

TIMEOUT = 30.0  # seconds without an answer or another byte
CHUNK = 1 << 18  # bytes


class Digest(NamedTuple):
    """What a file holds: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes with SHA-256 {self.sha256}"


def digest(chunks: Iterable[bytes]) -> Digest:
    """The digest of all chunks together."""
    size, sha256 = 0, hashlib.sha256()
    for chunk in chunks:
        size += len(chunk)
        sha256.update(chunk)
    return Digest(size, sha256.hexdigest())


def pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Read a file in chunks."""
    return iter(lambda: stream.read(CHUNK), b"")


def receive(url: str, *, timeout: float = TIMEOUT) -> Iterator[bytes]:
    """Download `url` in chunks, with a progress bar on a terminal's standard error and one plain line elsewhere.

    Raise DataError with the URL and the reason where it cannot be had whole. timeout: seconds of silence.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fedveil"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            length = response.length
            received = 0
            with _progress(url, length) as advance:
                for chunk in pieces(response):
                    received += len(chunk)
                    advance(len(chunk))
                    yield chunk
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise DataError(f"{url}: {error.reason}") from None
    except TimeoutError:
        raise DataError(f"{url}: no answer within {timeout:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {error}") from None
    if length is not None and received != length:
        raise DataError(f"{url}: the connection broke after {received:,} of {length:,} bytes")


def store(target: Path, chunks: Iterable[bytes], expected: Digest, source: str) -> None:
    """Write `target` in one step: a reader sees the whole file or none, even if the machine stops half way.

    Raise DataError where the chunks from `source` are not what is expected (nothing is kept then), or
    the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}; set FEDVEIL_CACHE to a folder you own") from None
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            found = digest(_written(chunks, stream))
            if found != expected:
                raise DataError(f"{source}: not the published file: expected {expected}, received {found}")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def received_file(url: str, folder: Path) -> IO[bytes]:
    """Download `url` into a nameless temporary file in `folder`; raise DataError as `receive` does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error.strerror}; set FEDVEIL_CACHE to a folder you own"
        ) from None
    try:
        for chunk in receive(url):
            stream.write(chunk)
    except OSError as error:
        stream.close()
        raise DataError(f"cannot write into {folder}: {error.strerror}") from None
    except BaseException:
        stream.close()
        raise
    stream.seek(0)
    return stream


def from_zip(archive: IO[bytes], member: str, source: str) -> bytes:
    """The content of one member of a zip file; raise DataError where it cannot be read."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source}: no '{member}' can be taken out of this zip file: {error}") from None


def enron_lines(archive: IO[bytes], source: str) -> dict[str, list[bytes]]:
    """The messages of one Enron-Spam archive (`enronN.tar.gz`), one line each, as `{"ham": [...], "spam": [...]}`.

    In the archive a message is a file `enronN/ham/0001.1999-12-10.farmer.ham.txt`; here its line breaks and its other
    control characters except tab are each one space, and a space and LF are put behind it. Lines follow file numbers.
    """
    numbered: dict[str, list[tuple[int, bytes]]] = {"ham": [], "spam": []}
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as opened:
            for member in opened:
                name = re.search(r"(?:^|/)(ham|spam)/(\d+)\.[^/]*\.txt$", member.name)
                content = opened.extractfile(member) if name and member.isfile() else None
                if name and content:
                    numbered[name[1]].append((int(name[2]), one_line(content.read())))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source}: this archive cannot be read: {error}") from None
    return {label: [line for _, line in sorted(lines)] for label, lines in numbered.items()}


def one_line(message: bytes) -> bytes:
    """A message as one line: see `enron_lines`."""
    return re.sub(rb"\r\n|[\x00-\x08\x0a-\x1f\x7f]", b" ", message) + b" \n"


def _written(chunks: Iterable[bytes], stream: IO[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        stream.write(chunk)
        yield chunk


@contextmanager
def _progress(url: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how far a download is; gives a function that is told the bytes that came."""
    if not sys.stderr.isatty():
        size = f" ({total:,} bytes)" if total else ""
        print(f"downloading {url}{size}", file=sys.stderr)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"downloading {url.rsplit('/', 1)[-1]}", total=total)
        yield lambda count: progress.advance(task, count)
