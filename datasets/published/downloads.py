"""Downloads of published data: a file is stored whole and checked, or not stored."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from typing import NamedTuple, cast

from fedveil.core.errors import DataError

TIMEOUT = 30.0  # seconds without an answer or further bytes
CHUNK = 1 << 18  # bytes


class Digest(NamedTuple):
    """The digest of a file's content: its size in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes with SHA-256 {self.sha256}"


def digest(content: bytes | io.BufferedIOBase) -> Digest:
    """Compute the digest of bytes, or of a file read to its end."""
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Digest(stream.seek(0, io.SEEK_END), sha256)


def download(url: str, target: Path, sha256: str | None, *, timeout: float = TIMEOUT) -> None:
    """Download `url` to `target`, with one line on standard error, and a progress bar where that is a terminal.

    sha256: the expected digest of the file, in hexadecimal; None where the caller checks what it makes of the file
    timeout: seconds without further bytes
    Raise DataError, with the URL and the reason, where the file cannot be downloaded or written, or is another one.
    """
    import pooch  # imports requests, which only a download needs
    import requests

    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=CHUNK,
        timeout=timeout,
        # no compression in transfer: the digest is that of the file as published
        headers={"User-Agent": "fedveil", "Accept-Encoding": "identity"},
    )
    pooch.get_logger().setLevel("WARNING")
    print(f"downloading {url}", file=sys.stderr)
    with written_into(target.parent):
        try:
            pooch.retrieve(url, sha256, target.name, target.parent, downloader=downloader)
        except requests.HTTPError as error:
            answer = cast(requests.Response, error.response)
            raise DataError(f"{url}: the server answered {answer.status_code} {answer.reason}") from None
        except requests.RequestException as error:
            raise DataError(f"{url}: {_reason(error, timeout)}") from None
        except ValueError as error:
            raise DataError(f"{url}: not the published file: {error}") from None


def store(target: Path, content: bytes) -> None:
    """Write `target` in one step: a reader sees the whole file or none. Raise DataError where it cannot be written."""
    with written_into(target.parent):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """Create `folder`; turn an OSError in it or in the body of the `with` statement into a DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error.strerror}; set FEDVEIL_CACHE to a folder you own"
        ) from None


def from_zip(archive: Path, member: str, source: str) -> bytes:
    """Read one member of a zip file; raise DataError where it cannot be read."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source}: no '{member}' can be taken out of this zip file: {error}") from None


def enron_lines(archive: Path, source: str) -> dict[str, list[bytes]]:
    """Read the messages of an Enron-Spam archive (`enronN.tar.gz`), one line each, as `{"ham": [...], "spam": [...]}`.

    In the archive a message is a file `enronN/ham/0001.1999-12-10.farmer.ham.txt`. Each of its line breaks and of its
    other control characters except tab becomes one space, and a space and LF are added at the end. Lines are in the
    order of file numbers. Raise DataError where the archive cannot be read.
    """
    numbered: dict[str, list[tuple[int, bytes]]] = {"ham": [], "spam": []}
    try:
        with tarfile.open(archive, mode="r:gz") as opened:
            for member in opened:
                name = re.search(r"(?:^|/)(ham|spam)/(\d+)\.[^/]*\.txt$", member.name)
                content = opened.extractfile(member) if name and member.isfile() else None
                if name and content:
                    numbered[name[1]].append((int(name[2]), one_line(content.read())))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source}: this archive cannot be read: {error}") from None
    return {label: [line for _, line in sorted(lines)] for label, lines in numbered.items()}


def one_line(message: bytes) -> bytes:
    """Make a message one line, as `enron_lines` describes."""
    return re.sub(rb"\r\n|[\x00-\x08\x0a-\x1f\x7f]", b" ", message) + b" \n"


def _reason(error: BaseException, timeout: float) -> str:
    """Say why a request failed, by the root of its chain of causes; and which proxy it went through, where that failed."""
    from requests.exceptions import ProxyError

    way = "the proxy of HTTPS_PROXY or HTTP_PROXY failed: " if isinstance(error, ProxyError) else ""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, TimeoutError):
        return f"{way}no answer within {timeout:g} seconds"
    if isinstance(error, IncompleteRead) and isinstance(error.partial, int):
        return f"the connection broke after {error.partial:,} of {error.partial + (error.expected or 0):,} bytes"
    return way + str((isinstance(error, OSError) and error.strerror) or error)
