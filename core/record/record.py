"""The record of a run: a folder that is readable at every moment, also after the run was killed.

experiment.toml      the settings as resolved
environment.json     versions, device, command, commit; resumes
metrics.csv          a row a round; no times in it, so that it repeats to the byte
clients.csv          a row a client a round
ledger.csv           bytes and seconds of every message
model.safetensors    the model after the last whole round; best.safetensors: after the best one
checkpoint/          what a resumed run starts from
plots/               pictures
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from shutil import rmtree
from typing import Any
from zlib import crc32

from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.settings.experiment import Experiment

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

TABLES = ("metrics.csv", "clients.csv", "ledger.csv")
CARRIED = 2**17  # bytes of rows that a checkpoint carries, before it is cheaper to flush the tables
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Table:
    """What a run wrote to a table: the start, which is on the disk for sure, and the rows that a power cut may take.

    length: bytes of the start; crc: their CRC-32
    rows: the bytes after them, which the checkpoint carries: one flush a round then keeps all tables
    """

    length: int = 0
    crc: int = 0
    rows: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the whole table."""
        return self.length + len(self.rows)


def write_atomically(path: Path, *content: bytes | memoryview, flush: bool = True) -> None:
    """Write a file so that it holds the old content or the new one, whole, whatever happens.

    flush: the new content is on the disk when this returns; without it a power cut may take either, not so a kill
    """
    temporary = path.with_name(f".{path.name}.part")
    with _named(path):
        try:
            with temporary.open("wb") as file:
                file.writelines(content)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it takes the room that others need
            raise
        if flush:
            _flush(path.parent)


def write_in_turn(path: Path, *content: bytes | memoryview) -> None:
    """Write a file that is written over and over, atomically; the one before it stays beside it, as previous-NAME.

    The room of the one before that is used again, which takes half the time of making and freeing files. Where a kill
    leaves no `path`, `newest` finds the previous one.
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
        _flush(path.parent)  # else a power cut could leave the old names, and the file now called previous written over


def newest(path: Path) -> Path:
    """The file that `write_in_turn` wrote last, which may not exist."""
    return _previous(path) if _previous(path).exists() and not path.exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f"previous-{path.name}")


@contextmanager
def alone(folder: Path, what: str = "writing this run") -> Iterator[None]:
    """Be the one process that writes in `folder`; raise SettingsError, which says `what` it does, where another one is.

    The system lets go of the folder when the process ends, however it ends. Systems without such locks go unguarded.
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables = {name: Table() for name in TABLES}

    @classmethod
    def create(cls, experiment: Experiment, out: str | Path | None = None, command: Sequence[str] = ()) -> Record:
        """Make the folder `out`, or runs/NAME-TIMESTAMP; raise SettingsError where it exists or cannot be made.

        The experiment's engine and device are the ones really used, not `auto`. Raise FedveilError where the disk is full,
        and leave no folder.
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
            record.write(
                "environment.json", json.dumps(environment(experiment.device, command), indent=2).encode() + b"\n"
            )
            record.write("experiment.toml", experiment.toml().encode())  # the last: with it a run can be resumed
            _flush(folder.parent)
        except OSError as error:
            rmtree(folder)
            raise _refusal(folder, error) from None
        return record

    def path(self, name: str) -> Path:
        """The path of a file of the record."""
        return self.folder / name

    def write(self, name: str, *content: bytes | memoryview, flush: bool = True) -> None:
        """Write a whole file of the record, as `write_atomically` does."""
        write_atomically(self.path(name), *content, flush=flush)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a table, all or none; the first rows ever name its columns."""
        rows = list(rows)
        if not rows:
            return
        table, columns, text = self.tables[name], list(rows[0]), io.StringIO()
        writer = csv.writer(
            text, lineterminator="\n"
        )  # floats as Python writes them, which loses nothing; None is empty
        if not table.size:
            writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)
        added, path = text.getvalue().encode(), self.path(name)
        with _named(path):
            try:
                with path.open("ab") as file:
                    file.write(added)
            except OSError:
                _cut(path, table.size)
                raise
        table.rows += added

    def settle(self) -> None:
        """Flush the tables where their rows outgrow what a checkpoint should carry."""
        if sum(len(table.rows) for table in self.tables.values()) > CARRIED:
            self._flush_tables()

    def _flush_tables(self) -> None:
        for name, table in self.tables.items():
            if table.rows:
                _flush(self.path(name))
                table.length, table.crc, table.rows = table.size, crc32(table.rows, table.crc), b""
        _flush(self.folder)

    def close(self) -> None:
        """Flush what was written without it: a finished run is safe from a power cut, and needs no previous checkpoint."""
        self._flush_tables()
        for path in self.folder.glob("*.safetensors"):
            _flush(path)
        for path in self.folder.glob("checkpoint/previous-*"):
            path.unlink()

    def check(self) -> None:
        """Raise SettingsError where a table's start is not the one that `tables` names: rows were edited or lost."""
        for name, table in self.tables.items():
            path = self.path(name)
            start = b""
            if path.exists():
                with path.open("rb") as file:
                    start = file.read(table.length)
            if len(start) < table.length or crc32(start) != table.crc:
                raise SettingsError(
                    f"fedveil resume {self.folder}: {name} is not as the run left it, rows were edited or lost; "
                    "put it back, or start a new run"
                )

    def cut(self) -> None:
        """Make each table what `tables` names: without rows of later rounds and half-written lines, no row missing."""
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
        """The SHA-256 of a file of the record, as `sha256sum` prints it."""
        return sha256(self.path(name).read_bytes()).hexdigest()

    @cached_property
    def settings(self) -> str:
        """The SHA-256 of experiment.toml when the run began: later versions may know more settings, with other defaults."""
        return self.sha256("experiment.toml")

    def replace_settings(self, text: bytes) -> None:
        """Write other settings to experiment.toml; from here on the run has these."""
        self.write("experiment.toml", text)
        self.__dict__.pop("settings", None)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError name the file: the system's own does not where a disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
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
    """Shorten a file to its first bytes; to none is to remove it."""
    if size:
        os.truncate(path, size)
    else:
        path.unlink(missing_ok=True)


def _refusal(folder: Path, error: OSError) -> FedveilError:
    """Why a record cannot be made: the folder cannot be had, which is the user's choice, or the disk is full."""
    kind = FedveilError if error.errno in FULL else SettingsError
    return kind(f"--out {folder}: cannot be written: {error.strerror or error}")


def _new_folder(parent: Path, name: str) -> Path:
    """Make and return parent/NAME-TIMESTAMP; two runs that start in the same second get a folder each."""
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


def environment(device: str, command: Sequence[str] = ()) -> dict[str, Any]:
    """What a reader of the record needs to repeat it: versions, machine, command, commit."""
    packages = ("fedveil", "flwr", "torch", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "command": list(command) or sys.argv,
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None where it is installed elsewhere."""
    here = Path(__file__).resolve()
    try:
        # installed inside some other project's checkout, this file is not one that git there knows
        subprocess.run(
            ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name],
            capture_output=True, timeout=5, check=True,
        )  # fmt: skip
        answer = subprocess.run(
            ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, it does not answer, or this is no checkout: the record says null
    return answer.stdout.strip() or None
