"""A run that is killed again and again, by the system's SIGKILL, until it ends by itself."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedveil import Experiment

# every kind of state that later rounds take from earlier ones, in rounds of some 30 ms
STATEFUL = {
    "data.clients": 6,
    "data.validation_fraction": 0.2,
    "model.hidden": [16],
    "training.epochs": 1,
    "training.schedule": "plateau",
    "training.schedule_rounds": 1,
    "federation.cohort": 3,
    "federation.rounds": 3,
    "federation.strategy": "fedadam",
    "federation.strategy.learning_rate": 3.0,  # too large: the loss rises, and the schedule answers
    "evaluation.federated": True,
}
WAIT = 120.0  # seconds for a process to get anywhere


def stateful(engine: str, rounds: int = 3, **settings: Any) -> Experiment:
    """The digits, with a strategy, a schedule and an evaluation that keep state."""
    return Experiment.preset("digits").override({**STATEFUL, "engine": engine, "federation.rounds": rounds, **settings})


def content(folder: Path) -> dict[str, Any]:
    """What a resumed run must repeat to the byte: the models and tables, ledger.csv without its seconds."""
    names = ("model.safetensors", "best.safetensors", "metrics.csv", "clients.csv")
    ledger = [line.rpartition(",")[0] for line in (folder / "ledger.csv").read_text().splitlines()]
    return {name: (folder / name).read_bytes() for name in names} | {"ledger.csv": ledger}


def command(*words: str | Path) -> list[str]:
    """The command line of `fedveil`, in this Python."""
    return [sys.executable, "-m", "fedveil", *map(str, words)]


def run_killed(experiment: Experiment, folder: Path, kills: int, seed: int) -> tuple[dict[str, Any], list[int]]:
    """Run in `folder`/run, kill the process `kills` times, and let it end; its summary, and the rows kept at each kill.

    Every fifth kill comes while the process starts, or soon after; the others after some rounds that it went on.
    """
    rng, out, kept, start = random.Random(seed), folder / "run", [], 0.0
    (folder / "settings.toml").write_text(experiment.toml())
    checkpoint = out / "checkpoint" / "state.safetensors"
    for number in range(kills):
        begun = (out / "experiment.toml").exists()
        if out.exists() and not begun:
            out.rmdir()  # killed between the making of the folder and the writing of anything
        words = ("resume", out) if begun else ("run", folder / "settings.toml", "--out", out)
        process = subprocess.Popen(command(*words, "--quiet"), cwd=folder)
        if number % 5 == 4:
            time.sleep(rng.uniform(0, 1.1 * start))
        else:
            began = time.monotonic()
            wait_for_changes(checkpoint, 1, process)
            start = time.monotonic() - began  # the newest: on a machine with other work it changes
            wait_for_changes(checkpoint, rng.randint(1, 3), process)
            time.sleep(rng.uniform(0, 0.06))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise AssertionError(f"kill {number + 1} of {kills} came too late: exit code {process.returncode}")
        metrics = out / "metrics.csv"
        kept.append(metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
    answer = subprocess.run(
        command("resume", out, "--quiet", "--json"), cwd=folder, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout), kept


def wait_for_changes(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file was replaced so many times, or the process ended."""
    seen, deadline = version(path), time.monotonic() + WAIT
    while count and process.poll() is None and time.monotonic() < deadline:
        now = version(path)
        if now not in (seen, None):
            seen, count = now, count - 1
        time.sleep(0.001)


def version(path: Path) -> tuple[int, int] | None:
    """Tells one content of a file from the next; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
