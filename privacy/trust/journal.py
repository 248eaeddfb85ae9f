"""A file of chained entries: the one of a client's privacy ledger (`ledger.py`).

One SQLite file, mode 0600. Each entry holds the SHA-256 of the one before and of itself, and the head says where they
end. A file that was cut, edited or damaged, or is of other data, is refused, and never begun anew. Who can write the file
can also write another one: it protects from servers, and not from its owner.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading, reason

FORMAT = 1
PATIENCE = 60.0  # seconds to wait for another client that writes to the same file
LATER = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)
_TABLES = """
CREATE TABLE ledger (format INTEGER, source TEXT, number INTEGER, link BLOB);
CREATE TABLE entries (number INTEGER PRIMARY KEY, at REAL, kind TEXT, run BLOB, round INTEGER, body BLOB, link BLOB);
CREATE TABLE answers (run BLOB, kind TEXT, number INTEGER, content BLOB, PRIMARY KEY (run, kind));
"""

Follow = Callable[[str, bytes, int, Mapping[str, Any]], None]  # takes an entry's kind, run, round and body


@dataclass(frozen=True)
class Entry:
    """One entry; `at`: seconds since the epoch, round: 0 where it is of none."""

    number: int
    at: float
    kind: str
    run: bytes
    round: int
    body: Mapping[str, Any]


class Journal:
    """The file, open in this process; several processes may have it open.

    connection: for tables beside the entries, within a transaction
    """

    def __init__(self, path: Path, source: str, follow: Follow, begin: Callable[[], None]) -> None:
        """Open the file of a data source, and read all of it; make it where there is none.

        source: the name of the data, by which a file of other data is noticed
        follow: receives each entry once, those of other processes too; begin: is called before the first, and again
        where entries were undone
        Raise ProtectionError where it is damaged, another data source's, or others than its owner can read it.
        """
        self.path, self.source = path, source
        self._follow_entry, self._begin = follow, begin
        try:
            if not path.exists():
                _make(path, source)
            found = path.stat()
        except OSError as error:
            raise ProtectionError(f"{path}: the privacy ledger cannot be read or made ({error.strerror})") from None
        self._inode = found.st_ino
        if not stat.S_ISREG(found.st_mode):
            raise ProtectionError(f"{path}: is no file, and so no privacy ledger; name one with --ledger")
        if os.name == "posix" and found.st_mode & 0o077:
            raise ProtectionError(
                f"{path}: others than its owner can read this privacy ledger (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 {path}"
            )
        with reading(damaged(path)):
            self.connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            with reading(damaged(path)):
                for pragma in (
                    "trusted_schema = OFF",
                    "journal_mode = TRUNCATE",
                    "synchronous = EXTRA",
                    "cell_size_check = ON",
                ):
                    self.connection.execute(f"PRAGMA {pragma}")
                if self.connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                    raise ValueError("SQLite finds it corrupt")
            self._restart()
            with self.transaction():
                pass
        except BaseException:
            self.connection.close()
            raise

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first."""
        with self.transaction():
            rows = self.connection.execute("SELECT number, at, kind, run, round, body FROM entries ORDER BY number")
            return [Entry(number, at, kind, run, when, json.loads(body)) for number, at, kind, run, when, body in rows]

    def enter(self, kind: str, run: bytes, number: int, body: Mapping[str, Any]) -> int:
        """Append an entry within a transaction, and return its place."""
        text = json.dumps(body).encode()
        row = (self._number + 1, time.time(), kind, run, number, text)
        link = _link(self._link, row)
        self.connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, link))
        self.connection.execute("UPDATE ledger SET number = ?, link = ?", (row[0], link))
        self._follow([(*row, link)])
        return row[0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Lock the file, read what other processes entered, and write all to the disk at the end.

        Undo everything where the block raises. Raise ProtectionError where the file is damaged or cannot be written.
        """
        started = -1
        try:
            with reading(damaged(self.path)):
                try:
                    self._check_file()
                    self.connection.execute("BEGIN IMMEDIATE")
                    self._catch_up()
                except sqlite3.Error as error:
                    raise _unusable(self.path, error) from None
            started = self._number
            yield
            self.connection.execute("COMMIT")
        except BaseException as error:
            if self.connection.in_transaction:
                self.connection.rollback()
            if self._number != started:  # what was followed was undone
                self._restart()
            if isinstance(error, sqlite3.Error):
                raise _unusable(self.path, error) from None
            raise

    def _restart(self) -> None:
        self._number, self._link = 0, _genesis(self.source)
        self._begin()

    def _check_file(self) -> None:
        """Raise ValueError where the file is another than was opened, or was cut."""
        found = os.stat(self.path)
        if found.st_ino != self._inode:
            raise ValueError("another file was put in its place while it was in use")
        size = self.connection.execute("PRAGMA page_size").fetchone()[0]
        if found.st_size % size:  # SQLite takes a last page that was cut for one of zeros
            raise ValueError("it was cut")

    def _catch_up(self) -> None:
        """Read the entries that are new since the last look, and check that the chain goes on to its end."""
        heads = self.connection.execute("SELECT format, source, number, link FROM ledger").fetchall()
        if len(heads) != 1 or heads[0][0] != FORMAT:
            raise ValueError("it has no head, or is of another version of FedVeil")
        _, source, number, link = heads[0]
        if source != self.source:
            raise ProtectionError(
                f"{self.path}: this privacy ledger is of the data {source}, and not of {self.source}; name another with --ledger"
            )
        self._follow(
            self.connection.execute(
                "SELECT number, at, kind, run, round, body, link FROM entries WHERE number > ? ORDER BY number",
                (self._number,),
            )
        )
        if (number, link) != (self._number, self._link):
            raise ValueError(f"it ends with entry {self._number}, and its head says {number}")

    def _follow(self, rows: Iterable[tuple[Any, ...]]) -> None:
        for *row, link in rows:
            if row[0] != self._number + 1 or _link(self._link, row) != link:
                raise ValueError(f"entry {self._number + 1} was changed or is missing")
            self._follow_entry(row[2], row[3], row[4], json.loads(row[5]))
            self._number, self._link = row[0], link


def source_of(path: Path) -> str:
    """Return the data source that a ledger's file names; raise ProtectionError where it names none."""
    with (
        reading(damaged(path)),
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection,
    ):
        return str(connection.execute("SELECT source FROM ledger").fetchone()[0])


def damaged(path: Path) -> Callable[[str], ProtectionError]:
    """Return what makes the error of a damaged file."""
    return lambda why: ProtectionError(
        f"{path}: the privacy ledger is damaged ({why}); put it back from a backup: without it nobody knows what the data "
        "has told already"
    )


def _unusable(path: Path, error: sqlite3.Error) -> ProtectionError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in LATER:
        return ProtectionError(
            f"{path}: the privacy ledger cannot be written now ({reason(error)}); nothing is answered before it can"
        )
    return damaged(path)(reason(error))


def _genesis(source: str) -> bytes:
    return sha256(b"fedveil ledger 1\0" + source.encode()).digest()


def _link(before: bytes, row: Iterable[Any]) -> bytes:
    """Return the SHA-256 of the entry before and of an entry's number, time, kind, run, round and body."""
    number, at, kind, run, round_number, body = row
    words = kind.encode()
    head = struct.pack(">QdqHH", number, at, round_number, len(words), len(run))
    return sha256(before + head + words + run + body).digest()


def _make(path: Path, source: str) -> None:
    """Make an empty ledger, whole or not at all; raise OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            connection.executescript(f"PRAGMA synchronous = EXTRA; BEGIN; {_TABLES} COMMIT;")
            connection.execute("INSERT INTO ledger VALUES (?, ?, 0, ?)", (FORMAT, source, _genesis(source)))
        try:
            os.link(unfinished, path)  # unlike a rename, never over a ledger that another process made meanwhile
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        unfinished.unlink()
