"""Show that the same settings and seed give the bytes of the reference: run both side by side here, and compare.

python tests/golden/compare.py --old PYTHON_OF_THE_REFERENCE --new PYTHON [--only NAME...] [--write tests/golden/table.json]

PYTHON is the interpreter of an environment with FedVeil in it. Without --old, what the reference gave on this processor is read
from a table. Without --new, the reference is run alone, as for --write. `--make-old DIR` first makes its environment in DIR, which
needs a checkout with its commit. Exit code 1 where a run differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # as pytest has it

from golden.programs import execute  # noqa: E402
from golden.runs import RUNS, Run  # noqa: E402

OLD = "ae21a97"  # the commit whose bytes are the reference: the last that changed them
TABLE = HERE / "table.json"


@dataclass(frozen=True)
class Given:
    """What a run gave.

    model_sha256: of model.safetensors; metrics: metrics.csv; of an attack, there is no model, and its scores
    model: model.safetensors, where it is at hand
    seconds: that the run took; error: why there is nothing, or empty
    """

    model_sha256: str = ""
    metrics: str = ""
    model: bytes = b""
    seconds: float = 0.0
    error: str = ""


MISSING = Given(error="nothing is known of this run")


def read(folder: Path, seconds: float = 0.0) -> Given:
    """What the record in a folder holds; of an attack, its scores."""
    scores = folder / "scores.csv"
    if scores.exists():
        return Given(metrics=scores.read_text(), seconds=seconds)
    try:
        model, metrics = (folder / "model.safetensors").read_bytes(), (folder / "metrics.csv").read_text()
    except OSError as error:
        return Given(error=f"{error.filename}: {error.strerror}", seconds=seconds)
    return Given(sha256(model).hexdigest(), metrics, model, seconds)


# --- what differs


def difference(old: Given, new: Given) -> str:
    """Where the first difference of two runs is, in words; empty where there is none."""
    for label, given in (("old", old), ("new", new)):
        if given.error:
            return f"{label} failed: {given.error}"
    table = "metrics.csv" if old.model_sha256 else "scores.csv"
    parts = [_table_difference(table, old.metrics, new.metrics), _model_difference(old, new)]
    return "; ".join(part for part in parts if part)


def _table_difference(table: str, old: str, new: str) -> str:
    """The first line of a table that differs, and its first column that does."""
    if old == new:
        return ""
    before, after = old.splitlines(), new.splitlines()
    columns = before[0].split(",") if before else []
    for number, (one, other) in enumerate(zip_longest(before, after, fillvalue=""), 1):
        cells, others = one.split(","), other.split(",")
        if number > 1 and len(cells) == len(others) == len(columns):
            for column, a, b in zip(columns, cells, others, strict=True):
                if a != b:
                    return f"{table} line {number}, {column}: {a or 'nothing'} became {b or 'nothing'}"
        elif one != other:
            return f"{table} line {number}: {one or 'nothing'} became {other or 'nothing'}"
    return f"{table}: the same lines with other ends"


def _model_difference(old: Given, new: Given) -> str:
    """The first number of the model that differs."""
    if old.model_sha256 == new.model_sha256:
        return ""
    if not (old.model and new.model):
        return f"model: SHA-256 {old.model_sha256[:12]} became {new.model_sha256[:12]}"
    before, after = load(old.model), load(new.model)
    if set(before) != set(after):
        return f"model: tensors {sorted(before)} became {sorted(after)}"
    for name in sorted(before):
        value, other = before[name], after[name]
        if value.shape != other.shape or value.dtype != other.dtype:
            return f"model: {name} {value.dtype}{list(value.shape)} became {other.dtype}{list(other.shape)}"
        apart = (_bytes(value) != _bytes(other)).any(axis=1)
        if apart.any():
            first = np.unravel_index(int(np.flatnonzero(apart)[0]), value.shape)
            largest = float(np.abs(value.astype(np.float64) - other).max())
            many = f"{int(apart.sum())} of {value.size} of its numbers, by up to {largest:.2g}"
            return f"model: {name}{[int(i) for i in first]} {value[first]!s} became {other[first]!s}; {many}"
    return "model: the same numbers in other bytes (names, order or header)"


def _bytes(value: np.ndarray) -> np.ndarray:
    """The bytes of each number of a tensor: uint8 [numbers, bytes of one]."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).reshape(value.size, value.itemsize)


# --- running


def run_sides(runs: Sequence[Run], sides: Mapping[str, Path], folder: Path) -> dict[str, dict[str, Given]]:
    """Run experiments with several Pythons at the same time, by label; what each gave, by label and name."""
    stopped = Event()
    with ThreadPoolExecutor() as pool:
        working = {
            label: pool.submit(run_all, runs, python, folder / label, label, stopped) for label, python in sides.items()
        }
        try:
            return {label: work.result() for label, work in working.items()}
        except BaseException:
            stopped.set()  # after Ctrl-C nothing more is begun
            raise


def run_all(
    runs: Sequence[Run], python: Path, folder: Path, label: str, stopped: Event | None = None
) -> dict[str, Given]:
    """Run experiments with the FedVeil of a Python, in a new folder; what each gave, by name."""
    given: dict[str, Given] = {}

    def note(run: Run, seconds: float, error: str) -> None:
        found = Given(error=error, seconds=seconds) if error else read(folder / run.name / "run", seconds)
        given[run.name] = found
        print(f"{label}  {run.name}  {seconds:.1f} s{'  FAILED' if found.error else ''}", file=sys.stderr, flush=True)

    for run in runs:
        (folder / run.name).mkdir(parents=True)
        for name, content in run.files.items():
            (folder / run.name / name).write_text(content)
    _run_here([run for run in runs if run.way == "here"], python, folder, note)
    for run in runs:
        if run.way != "here" and not (stopped and stopped.is_set()):
            note(run, *execute(run, python, folder / run.name))
    return given


def _run_here(runs: Sequence[Run], python: Path, folder: Path, note: Callable[[Run, float, str], None]) -> None:
    """Run experiments by `execute.py`."""
    by_name = {run.name: run for run in runs}
    keys = ("name", "preset", "text", "settings")
    jobs = [{"folder": str(folder / run.name), **{key: getattr(run, key) for key in keys}} for run in runs]
    if not jobs:
        return
    process = subprocess.Popen(
        [python, HERE / "execute.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
        for line in process.stdout:
            told = json.loads(line)
            note(by_name.pop(told["name"]), told["seconds"], told["error"])
        code = process.wait()
        for run in by_name.values():
            note(run, 0.0, f"not run: {python} execute.py ended with exit code {code}")
    finally:
        process.kill()
        process.wait()


def machine_of(python: Path) -> dict[str, str]:
    """What `machine.py` says in a Python."""
    answer = subprocess.run([python, HERE / "machine.py"], capture_output=True, text=True, check=True)
    return dict(json.loads(answer.stdout))


def make_old(folder: Path) -> Path:
    """Make an environment of the reference in a folder, where there is none yet; its Python."""
    source, python = folder / "source", folder / "venv" / "bin" / "python"
    if not (folder / "ready").exists():
        source.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", OLD], cwd=HERE.parents[1], capture_output=True, check=False)
        if archive.returncode:
            sys.exit(f"--make-old: this checkout does not hold commit {OLD}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "x"], cwd=source, input=archive.stdout, check=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", ".[ray]"]
        subprocess.run(install, cwd=source, check=True)
        (folder / "ready").touch()
    return python


def other_machine(written: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What sets the machine of a table apart from this one, in words; empty where nothing does."""
    differing = [key for key in written if written[key] != here.get(key)]
    if not differing:
        return ""
    words = [f"its {key} is {written[key]!r}, here {here.get(key)!r}" for key in differing]
    return f"made on {written['processor']}, this is {here['processor']}: {'; '.join(words)}"


# --- the table of what the reference gave


def read_table(path: Path) -> tuple[dict[str, str], dict[str, Given]]:
    """The machine of a table, and what the reference gave there, by run."""
    told = json.loads(path.read_text())
    return told["machine"], {
        name: Given(row["model_sha256"], "\n".join(row["metrics"])) for name, row in told["runs"].items()
    }


def write_table(path: Path, machine: dict[str, str], given: Mapping[str, Given]) -> None:
    """Write what the reference gave on this machine; rows of other runs stay where they are of the same machine."""
    rows: dict[str, Any] = {}
    if path.exists() and json.loads(path.read_text())["machine"] == machine:
        rows = json.loads(path.read_text())["runs"]
    rows |= {
        name: {"model_sha256": found.model_sha256, "metrics": found.metrics.split("\n")}
        for name, found in given.items()
    }
    table = {"commit": OLD, "machine": machine, "runs": {name: rows[name] for name in RUNS if name in rows}}
    path.write_text(json.dumps(table, indent=1) + "\n")


# --- the command


def report(console: Console, runs: Sequence[Run], old: Mapping[str, Given], new: Mapping[str, Given]) -> int:
    """Print a row for each run, and where each first differs; how many do, or failed."""
    found = {run.name: difference(old.get(run.name, MISSING), new.get(run.name, MISSING)) for run in runs}
    grid = Table("run", "covers", "old, s", "new, s", "bytes", box=None, pad_edge=False)
    for column, width in zip(grid.columns, (33, 20, 6, 6, 6), strict=True):
        column.no_wrap, column.min_width, column.max_width = True, min(width, 6), width
    for run in runs:
        seconds = [given.get(run.name, MISSING).seconds for given in (old, new)]
        word = "[bold red]differ[/]" if found[run.name] else "same"
        grid.add_row(run.name, run.covers, *(f"{value:.1f}" if value else "" for value in seconds), word)
    console.print(grid)
    for name, words in found.items():
        if words:
            console.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
    bad = sum(map(bool, found.values()))
    console.print(f"{len(runs)} runs: {len(runs) - bad} give the same bytes, {bad} do not", highlight=False)
    return bad


def chosen(only: Sequence[str], console: Console) -> list[Run]:
    """The runs asked for whose data is here; a name may be the first part of several, as in `strategy-`."""
    names = [name for name in RUNS if not only or any(name == word or _starts(name, word) for word in only)]
    unknown = [word for word in only if not any(name == word or _starts(name, word) for name in RUNS)]
    if unknown:
        sys.exit(f"--only {unknown[0]}: no run is called so, or starts with it and a hyphen; known: {', '.join(RUNS)}")
    folder, runs = os.environ.get("FEDVEIL_DATA"), []
    for run in map(RUNS.__getitem__, names):
        if run.data and not (folder and (Path(folder) / run.data).is_dir()):
            console.print(
                f"NOT RUN: {run.name} needs {run.data}/ in the folder that FEDVEIL_DATA names", style="bold red"
            )
        else:
            runs.append(run)
    return runs


def _starts(name: str, word: str) -> bool:
    return name.startswith(word.rstrip("-") + "-")


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line, run and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="PYTHON", help="of the reference; the table without it")
    parser.add_argument("--new", type=Path, metavar="PYTHON", help="of the code to check")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of runs, or what they start with")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", default=TABLE, help="what the reference gave; golden/table.json"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write what --old gave as a table")
    parser.add_argument(
        "--make-old", type=Path, metavar="DIR", help="make an environment of the reference in DIR, and use it"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for the records; else they are removed")
    asked = parser.parse_args(words)
    console = Console()
    pythons = {"old": make_old(asked.make_old.absolute()) if asked.make_old else asked.old, "new": asked.new}
    sides = {label: python.absolute() for label, python in pythons.items() if python}
    if not sides or (asked.write and "old" not in sides):
        parser.error("name a Python by --old or --new; --write needs --old")
    for label, python in sides.items():
        if not python.is_file():
            parser.error(f"--{label} {python}: there is no such file")
    runs = chosen(asked.only, console)
    if not runs:
        sys.exit("nothing to compare")
    machines = {label: machine_of(python) for label, python in sides.items()}
    given: dict[str, dict[str, Given]] = {}
    if "old" not in sides:
        machines["old"], given["old"] = read_table(asked.table)
    if other := other_machine(machines["old"], machines.get("new", machines["old"])):
        sys.exit(f"what --new gives cannot be compared with {'--old' if 'old' in sides else asked.table}: {other}")
    if asked.keep:
        asked.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as made:
        given |= run_sides(runs, sides, asked.keep.absolute() if asked.keep else Path(made))
    if asked.write:
        write_table(
            asked.write, machines["old"], {name: found for name, found in given["old"].items() if not found.error}
        )
    if "new" not in given:
        failed = [name for name, found in given["old"].items() if found.error]
        for name in failed:
            console.print(
                f"{name}: old failed: {given['old'][name].error}", markup=False, highlight=False, soft_wrap=True
            )
        return 1 if failed else 0
    return 1 if report(console, runs, given["old"], given["new"]) else 0


if __name__ == "__main__":
    sys.exit(main())
