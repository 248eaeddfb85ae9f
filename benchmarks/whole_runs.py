"""The CPU time that protection adds to whole runs of `mnist-mlp`, started as by a user, workers included.

A run of few rounds is subtracted from one of more, so that starting, loading and evaluating do not count.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contest import LONGEST, Measures
from fedveil.core.errors import FedveilError

PROTECTION, COHORT = "bfv", 10
ENGINE = "batched"


@dataclass(frozen=True)
class Job:
    """A preset with `epochs` local epochs, and the rounds of the shorter and of the longer run."""

    preset: str
    epochs: int
    rounds: tuple[int, int]

    @property
    def name(self) -> str:
        """The job in words."""
        return f"{self.preset}, {self.epochs} local epochs, {PROTECTION}"


JOBS = (
    Job("mnist-mlp", 5, (2, 22)),  # the epochs of the preset
    Job("mnist-mlp", 225, (1, 4)),  # a client trains for about a second
)


def measure(
    settings: dict[str, Any], repeats: int, progress: Callable[[str], None] = lambda _: None
) -> tuple[list[Measures], list[str]]:
    """Measure each of JOBS with and without protection in turn; return rows, and notes where a run fails.

    settings: changes to every run, such as `engine` and `workers`
    """
    rows, notes = [], []
    for job in JOBS:
        times: dict[str, list[float]] = {"none": [], PROTECTION: []}
        try:
            for turn in range(1, repeats + 1):
                for protection, found in times.items():
                    found.append(cpu_ms_per_client(job, protection, settings))
                    progress(
                        f"{job.preset}, {job.epochs} local epochs, {protection} {turn}/{repeats}: {found[-1]:.3g} ms a client"
                    )
        except FedveilError as error:
            notes.append(f"{job.name}: not measured: {str(error).splitlines()[0]}")
            continue
        plain, protected = (statistics.median(found) for found in times.values())
        rows.append({
            "job": job.name,
            "plain_ms": plain,
            "protected_ms": protected,
            "added_ms": protected - plain,
            "times": protected / plain,
            "runs_ms": times,
        })  # fmt: skip
    return rows, notes


def cpu_ms_per_client(job: Job, protection: str, settings: dict[str, Any]) -> float:
    """Measure the CPU time of a client's round, with its share of the server's, in milliseconds."""
    few, more = job.rounds
    seconds = _cpu_seconds(job, protection, more, settings) - _cpu_seconds(job, protection, few, settings)
    return seconds / (more - few) / COHORT * 1e3


def _cpu_seconds(job: Job, protection: str, rounds: int, settings: dict[str, Any]) -> float:
    """Return the CPU seconds of a run and its processes; raise FedveilError, with its last lines, where it fails."""
    changes = {
        "privacy.protection": protection, "training.epochs": job.epochs, "federation.rounds": rounds,
        "federation.cohort": COHORT, "evaluation.every": rounds, **{"engine": ENGINE, **settings},
    }  # fmt: skip
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = _children()
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "fedveil", "run", job.preset, *words, "--quiet", "--out", str(Path(folder, "run"))],
            capture_output=True, text=True, timeout=LONGEST, check=False, env={**os.environ, **one_thread},
        )  # fmt: skip
    if answer.returncode != 0:
        last = "\n  ".join((answer.stderr.strip() or answer.stdout.strip()).splitlines()[-3:])
        raise FedveilError(
            f"fedveil run {job.preset} with {protection} failed (exit code {answer.returncode}):\n  {last}"
        )
    return _children() - before


def _children() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
