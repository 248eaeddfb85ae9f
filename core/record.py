"""The record of a run: a folder that is readable at every moment, also after the run was killed.

experiment.toml      the settings as resolved
environment.json     versions, device, command, commit
metrics.csv          a row a round; no times in it, so that it repeats to the byte
clients.csv          a row a client a round
ledger.csv           bytes and seconds of every message
model.safetensors    the model after the last whole round; best.safetensors: after the best one
checkpoint/          what a resumed run starts from
plots/               pictures
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from fedveil.core.errors import SettingsError
from fedveil.core.experiment import Experiment

TABLES = ("metrics.csv", "clients.csv", "ledger.csv")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new one, whole, whatever happens."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Record:
    """The folder of one run, open for writing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, experiment: Experiment, out: str | Path | None = None, command: Sequence[str] = ()) -> Record:
        """Make the folder `out`, or runs/NAME-TIMESTAMP; raise SettingsError where it exists or cannot be made.

        The experiment's engine and device are the ones really used, not `auto`.
        """
        folder = Path("runs" if out is None else out)
        try:
            if out is None:
                folder = _new_folder(folder, experiment.name)
            else:
                folder.mkdir(parents=True)
        except FileExistsError:
            raise SettingsError(
                f"--out {folder}: exists already; name another folder (or --resume {folder} to go on with that run)"
            ) from None
        except OSError as error:
            raise SettingsError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
        record = cls(folder)
        try:
            record.write("experiment.toml", experiment.toml().encode())
            found = environment(experiment.device, command)
            record.write("environment.json", json.dumps(found, indent=2).encode() + b"\n")
        except OSError as error:
            raise SettingsError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
        return record

    def path(self, name: str) -> Path:
        """The path of a file of the record."""
        return self.folder / name

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file of the record, atomically."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)

    def append(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a table in one write; the first rows ever name its columns."""
        path = self.path(table)
        rows = list(rows)
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        if not path.exists():
            writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        with path.open("ab") as file:
            file.write(text.getvalue().encode())

    def remove(self, name: str) -> None:
        """Remove a file of the record, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def cut(self, last_round: int) -> None:
        """Drop all rows of rounds after `last_round`, and any half-written line: a resumed run makes them again."""
        for table in TABLES:
            path = self.path(table)
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                if not lines or not lines[0].endswith(b"\n"):
                    path.unlink()  # killed while it wrote the names of the columns
                    continue
                kept = [line for line in lines[1:] if line.endswith(b"\n") and int(line.split(b",")[0]) <= last_round]
                write_atomically(path, b"".join(lines[:1] + kept))

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file of the record, as `sha256sum` prints it."""
        return sha256(self.path(name).read_bytes()).hexdigest()


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


def _cell(value: Any) -> Any:
    """Floats as Python writes them, which loses nothing; None as an empty cell."""
    return "" if value is None else repr(float(value)) if isinstance(value, float) else value
