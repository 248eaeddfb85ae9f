"""The record of a run: a folder that is readable at every moment, also after the run was killed.

experiment.toml      the settings as resolved
environment.json     versions, device, command, commit; what of a user's files was left out; resumes
metrics.csv          a row a round; no times in it, so that it repeats to the byte
clients.csv          a row a client a round
ledger.csv           bytes and seconds of every message
model.safetensors    the model after the last whole round; best.safetensors: after the best one
model.sealed         under ckks and bfv that model as a ciphertext; layout.safetensors: the names and shapes in it
checkpoint/          what a resumed run starts from
plots/               pictures
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any
from zlib import crc32

from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.foreign import cell
from fedveil.core.record.environment import environment
from fedveil.core.settings.experiment import Experiment

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

TABLES = ("metrics.csv", "clients.csv", "ledger.csv")
CARRIED = 2**17  # bytes of rows in a checkpoint, above which it is cheaper to flush the tables
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Table:
    """What a run wrote to a CSV file: the start, which was flushed to the disk, and rows that a power cut may lose.

    length: bytes of the start; crc: their CRC-32
    rows: the bytes after the start; the checkpoint holds them too, so that one flush a round keeps all tables
    """

    length: int = 0
    crc: int = 0
    rows: bytes = b""

    @property
    def size(self) -> int:
        """Size of the whole table in bytes."""
        return self.length + len(self.rows)


def write_atomically(path: Path, *content: bytes | memoryview, flush: bool = True, private: bool = False) -> None:
    """Write a file in one step: a kill at any moment leaves the old content or the new one, whole.

    flush: wait until the new content is on the disk; without it, a power cut may lose content, but a kill may not
    private: nobody but the owner can read the file, from its first byte on
    """
    temporary = path.with_name(f".{path.name}.part")
    with _named(path):
        try:
            if private:
                temporary.unlink(missing_ok=True)  # one that is left of a killed process may be readable by others
            with open(
                temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)
            ) as file:
                file.writelines(content)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it takes up space that others need
            raise
        if flush:
            _flush(path.parent)


def write_in_turn(path: Path, *content: bytes | memoryview) -> None:
    """Write a file that is rewritten often, in one step; keep its last version beside it, as previous-NAME.

    The version before the last is overwritten, which takes half the time of creating and deleting files. Where a kill
    leaves no `path`, `newest` returns the previous version.
    """
    previous, temporary = _previous(path), path.with_name(f".{path.name}.part")
    with _named(path):
        if path.exists() and previous.exists():
            previous.replace(temporary)
        elif previous.exists():
            previous.replace(path)
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.writelines(content)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if path.exists():
            path.replace(previous)
        temporary.replace(path)
        _flush(path.parent)  # else, after a power cut, `path` could name the file that the next write overwrites


def newest(path: Path) -> Path:
    """Return the path of the file that `write_in_turn` wrote last, which may not exist."""
    return _previous(path) if _previous(path).exists() and not path.exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f"previous-{path.name}")


@contextmanager
def alone(folder: Path, what: str = "writing this run") -> Iterator[None]:
    """Lock `folder` for this process; raise SettingsError where another process holds the lock.

    The system releases the lock when the process ends, also by a kill. Without `fcntl` (Windows) there is no lock.
    what: what the other process is doing, for the message
    """
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    with _named(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 32).decode("ascii", "replace") or "unknown"
            raise SettingsError(
                f"{folder}: another process (pid {owner}) is {what}; wait for it to end, or stop it"
            ) from None
        try:
            with _named(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Record:
    """The folder of one run, open for writing."""

    def __init__(self, folder: Path, carried: int = CARRIED) -> None:
        """`carried`: bytes of rows that a checkpoint holds before the tables are flushed."""
        self.folder, self._carried = folder, carried
        self.tables = {name: Table() for name in TABLES}
        self._columns: dict[str, list[str]] = {}

    @classmethod
    def create(
        cls,
        experiment: Experiment,
        out: str | Path | None = None,
        command: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> Record:
        """Create the folder `out`, or runs/NAME-TIMESTAMP without it, and write the settings and environment into it.

        experiment: with the engine and device that are really used, not `auto`
        files: what of a user's files was left out or changed
        Raise SettingsError where the folder exists or cannot be created. Raise FedveilError where the disk is full; no
        folder is left then.
        """
        folder = Path("runs" if out is None else out)
        try:
            if out is None:
                folder = _new_folder(folder, experiment.name)
            else:
                folder.mkdir(parents=True)
        except FileExistsError:
            resumable = (folder / "experiment.toml").is_file()
            hint = f"; `fedveil resume {folder}` goes on with that run" if resumable else ""
            raise SettingsError(f"--out {folder}: exists already; name another folder{hint}") from None
        except OSError as error:
            raise _refusal(folder, error) from None
        record = cls(folder)
        try:
            record.path("checkpoint").mkdir()
            described = environment(experiment.device, command) | ({"files": list(files)} if files else {})
            record.write("environment.json", json.dumps(described, indent=2).encode() + b"\n")
            record.write("experiment.toml", experiment.toml().encode())  # last: a folder that has it can be resumed
            _flush(folder.parent)
        except OSError as error:
            rmtree(folder)
            raise _refusal(folder, error) from None
        return record

    def path(self, name: str) -> Path:
        """Return the path of a file of the record."""
        return self.folder / name

    def write(self, name: str, *content: bytes | memoryview, flush: bool = True, private: bool = False) -> None:
        """Write a whole file of the record, as `write_atomically` does."""
        write_atomically(self.path(name), *content, flush=flush, private=private)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a table, all or none.

        The first rows set its columns; a later row may have more, which are then empty in the rows before it.
        """
        rows = list(rows)
        if not rows:
            return
        table, path = self.tables[name], self.path(name)
        if not table.size:
            self._columns[name] = list(rows[0])
        known = self._header(name)
        columns = [*known, *(column for column in rows[0] if column not in known)]
        lines = [[cell(row.get(column)) for column in columns] for row in rows]
        if columns != known:
            self._widen(name, columns, lines)
            return
        added = _csv(lines if table.size else [columns, *lines])
        with _named(path):
            try:
                with path.open("ab") as file:
                    file.write(added)
            except OSError:
                _cut(path, table.size)
                raise
        table.rows += added

    def _header(self, name: str) -> list[str]:
        """Return the columns of a table that has some rows."""
        if name not in self._columns:
            with self.path(name).open(newline="", encoding="utf-8") as file:
                self._columns[name] = next(csv.reader(file))
        return self._columns[name]

    def _widen(self, name: str, columns: list[str], lines: Sequence[Sequence[Any]]) -> None:
        """Append lines to a table with more columns; the narrow one is kept, as the last checkpoint is of that one."""
        path = self.path(name)
        old = path.read_bytes()
        header, *before = csv.reader(io.StringIO(old.decode(), newline=""))
        new = _csv([columns, *([*line, *[""] * (len(columns) - len(header))] for line in before), *lines])
        write_atomically(_narrow(path), old)
        write_atomically(path, new)
        self.tables[name], self._columns[name] = Table(rows=new), columns

    def settle(self) -> None:
        """Flush the tables where their unflushed rows are too many for a checkpoint."""
        if sum(len(table.rows) for table in self.tables.values()) > self._carried:
            self._flush_tables()

    def _flush_tables(self) -> None:
        for name, table in self.tables.items():
            if table.rows:
                _flush(self.path(name))
                table.length, table.crc, table.rows = table.size, crc32(table.rows, table.crc), b""
        _flush(self.folder)

    def close(self) -> None:
        """Flush all files to the disk, and delete previous checkpoints, which a finished run does not need."""
        self._flush_tables()
        for path in self.folder.glob("*.safetensors"):
            _flush(path)
        for path in [*self.folder.glob("checkpoint/previous-*"), *map(_narrow, map(self.path, TABLES))]:
            path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise SettingsError where the start of a table differs from `tables`: rows were edited or lost."""
        for name, table in self.tables.items():
            path = self.path(name)
            if _begins(path, table):
                continue
            if _narrow(path).exists() and _begins(_narrow(path), table):  # killed before a checkpoint of the wide one
                _narrow(path).replace(path)
            else:
                raise SettingsError(
                    f"fedveil resume {self.folder}: {name} is not as the run left it, rows were edited or lost; "
                    "put it back, or start a new run"
                )

    def cut(self) -> None:
        """Restore each table to the content in `tables`: drop later rows and half-written lines, add lost rows."""
        self._columns = {}
        for name, table in self.tables.items():
            path = self.path(name)
            with _named(path):
                if not table.size:
                    path.unlink(missing_ok=True)
                    continue
                path.touch()
                with path.open("r+b") as file:
                    file.seek(table.length)
                    if file.read() != table.rows:
                        file.seek(table.length)
                        file.truncate()
                        file.write(table.rows)

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file of the record, as `sha256sum` prints it."""
        return sha256(self.path(name).read_bytes()).hexdigest()

    @cached_property
    def settings(self) -> str:
        """SHA-256 of the file experiment.toml, not of the settings: a later version may have other defaults."""
        return self.sha256("experiment.toml")

    def replace_settings(self, text: bytes) -> None:
        """Replace the content of experiment.toml."""
        self.write("experiment.toml", text)
        self.__dict__.pop("settings", None)


def _csv(lines: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)  # repr of floats, which loses no digits; None is empty
    return text.getvalue().encode()


def _narrow(path: Path) -> Path:
    return path.with_name(f".{path.name}.narrow")


def _begins(path: Path, table: Table) -> bool:
    """Say whether a file begins with the start of a table."""
    start = b""
    if path.exists():
        with path.open("rb") as file:
            start = file.read(table.length)
    return len(start) == table.length and crc32(start) == table.crc


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError; the system's error for a full disk lacks it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what some network file systems answer for a folder
                raise
        finally:
            os.close(descriptor)


def _cut(path: Path, size: int) -> None:
    """Shorten a file to its first `size` bytes; remove it where `size` is 0."""
    if size:
        os.truncate(path, size)
    else:
        path.unlink(missing_ok=True)


def _refusal(folder: Path, error: OSError) -> FedveilError:
    """Return the error for a record that cannot be created: FedveilError where the disk is full, else SettingsError."""
    kind = FedveilError if error.errno in FULL else SettingsError
    return kind(f"--out {folder}: cannot be written: {error.strerror or error}")


def _new_folder(parent: Path, name: str) -> Path:
    """Create and return parent/NAME-TIMESTAMP; runs that start in the same second get a number after it."""
    parent.mkdir(exist_ok=True)
    stamp, n = datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = parent / (f"{name}-{stamp}" if n == 1 else f"{name}-{stamp}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            n += 1
        else:
            return folder
