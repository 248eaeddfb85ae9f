"""The contest: FedVeil, the bare loops and the peers run a job in turn, several times, each run in a new process.

The quoted figure is milliseconds a client, a round's wall-clock time divided by its cohort: the median over a run's
rounds without the first, and of these the median over the runs. The spread is the least and the most over the runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT, jobs
from benchmarks.jobs import Job
from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.settings.experiment import Experiment

Measures = dict[str, Any]
PEERS = {"flower": (".venv-flower", "flower.py"), "pfl": (".venv-pfl", "apple.py")}  # environment, script
BARE = {"mlp": ("autograd", "by hand"), "lstm": ("one by one",)}  # the bare loops of a network, see bare.py
LONGEST = 1800.0  # seconds of one run


@dataclass(frozen=True)
class Entry:
    """One contestant, or one of its variants, of which the fastest is quoted.

    command: of a process that prints a JSON line; the time of its start is added as the last argument
    text: its standard input
    environment: variables set for it; None removes one
    required: whether its failure ends the contest
    """

    contestant: str
    variant: str
    command: tuple[str, ...]
    text: str = ""
    environment: dict[str, str | None] = field(default_factory=dict)
    required: bool = True


def find_peers(given: dict[str, Path | None]) -> tuple[dict[str, Path], list[str]]:
    """Return the Python of each peer's environment, and a line for each peer that is not installed.

    given: by peer, the Python that a user named, or None for the conventional path in the working directory
    Raises SettingsError where a named one is not there.
    """
    found, missing = {}, []
    for name, (folder, _) in PEERS.items():
        named = given.get(name)
        python = (named or Path(folder, "bin", "python")).absolute()
        if python.is_file():
            found[name] = python
        elif named:
            raise SettingsError(f"--{name} {named}: is no Python; give the one of an environment that has {name}")
        else:
            missing.append(f"{name}: not measured, there is no {folder} here; make peers, or --{name} PYTHON")
    return found, missing


def entries(job: Job, experiment: Experiment, peers: dict[str, Path]) -> list[Entry]:
    """Return the entries that run a job, in the order of their turns."""
    cores = os.cpu_count() or 1
    listed = [fedveil(experiment)]
    listed += [
        Entry("bare", variant, (sys.executable, "-P", "-m", "benchmarks.bare", variant, job.name))
        for variant in BARE[job.model]
    ]
    for name, python in peers.items():
        script = Path(__file__).with_name("peers") / PEERS[name][1]
        command = (str(python), str(script), json.dumps(jobs.plain(job)))
        threads = sorted({1, cores}) if name == "pfl" else [None]
        listed += [
            Entry(
                name,
                f"{count} threads" if count else f"{cores} workers",
                command,
                environment={"OMP_NUM_THREADS": str(count) if count else None, "PYTHONPATH": None},
                required=False,
            )
            for count in threads
        ]
    return listed


def fedveil(experiment: Experiment, *options: str) -> Entry:
    """Return the entry that runs an experiment on FedVeil's public path."""
    command = (sys.executable, "-P", "-m", "benchmarks.one_run", *options)
    return Entry("fedveil", "", command, experiment.toml())


def run_once(entry: Entry) -> Measures:
    """Run an entry in a new process and an empty folder; return the object it prints.

    Raises FedveilError, with the last lines of its output, where it fails.
    """
    environment: dict[str, str | None] = {**os.environ, "OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", **entry.environment}
    label = " ".join(filter(None, (entry.contestant, entry.variant)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            answer = subprocess.run(
                [*entry.command, str(time.time())],
                input=entry.text, capture_output=True, text=True, cwd=folder, timeout=LONGEST, check=False,
                env={key: value for key, value in environment.items() if value is not None},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise FedveilError(f"benchmark: {label} did not end within {LONGEST:.0f} s") from None
    printed = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    if answer.returncode != 0 or not printed:
        last = "\n  ".join((answer.stderr.strip() or answer.stdout.strip()).splitlines()[-3:])
        raise FedveilError(f"benchmark: {label} failed (exit code {answer.returncode}):\n  {last}")
    measures: Measures = json.loads(printed[-1])
    return measures


def compare(
    job: Job, listed: Sequence[Entry], repeats: int, progress: Callable[[str], None] = lambda _: None
) -> Measures:
    """Run the job by all entries in turn, `repeats` times, and return the figures side by side.

    Raises FedveilError where FedVeil or a bare loop fails, or FedVeil's runs give different models; where a peer fails,
    its figures are null and `notes` says why.
    """
    runs: dict[tuple[str, str], list[Measures]] = defaultdict(list)
    failed: dict[tuple[str, str], str] = {}
    for turn in range(1, repeats + 1):
        for entry in listed:
            key = (entry.contestant, entry.variant)
            if key in failed:
                continue
            try:
                runs[key].append(run_once(entry))
            except FedveilError as error:
                if entry.required:
                    raise
                failed[key] = " ".join(str(error).split())
                continue
            spent = ms_per_client(runs[key][-1], job.cohort)
            progress(f"{job.name} {turn}/{repeats}  {' '.join(key).strip()}: {spent:.3g} ms a client")
    models = {run["model_sha256"] for run in runs["fedveil", ""]}
    if len(models) > 1:
        raise FedveilError(
            f"benchmark: {job.name} gave different models in {repeats} runs: {', '.join(sorted(models))}"
        )
    return _side_by_side(job, {key: found for key, found in runs.items() if key not in failed}, list(failed.values()))


def ms_per_client(run: Measures, cohort: int) -> float:
    """Return a run's milliseconds a client: the median over its rounds without the first."""
    round_s: list[float] = run["round_s"]
    return statistics.median(round_s) / cohort * 1e3


def _side_by_side(job: Job, runs: dict[tuple[str, str], list[Measures]], notes: list[str]) -> Measures:
    """Return the object that `python -m benchmarks JOB --json` prints, without the stages and the machine."""
    times = {key: [ms_per_client(run, job.cohort) for run in found] for key, found in runs.items()}
    own = runs["fedveil", ""]
    row: Measures = {"job": job.name}
    for contestant in ("fedveil", "bare", *PEERS):
        prefix = "" if contestant == "fedveil" else f"{contestant}_"
        variants = [key for key in times if key[0] == contestant]
        best = min(variants, key=lambda key: statistics.median(times[key]), default=None)
        row |= {
            f"{prefix}ms_per_client": statistics.median(times[best]) if best else None,
            f"{prefix}ms_per_client_range": [min(times[best]), max(times[best])] if best else None,
            f"{prefix}first_round_s": statistics.median(run["first_round_s"] for run in runs[best]) if best else None,
        }
        if contestant != "fedveil":
            row |= {
                f"{prefix}variant": best[1] if best else None,
                f"{prefix}version": runs[best][-1]["version"] if best else None,
            }
    for peer in PEERS:
        spent = row[f"{peer}_ms_per_client"]
        row[f"{peer}_speedup"] = spent / row["ms_per_client"] if spent else None
    rate = max(run["flops_per_s"] for key, found in runs.items() if key[0] == "bare" for run in found)
    return row | {
        "times_bare": row["ms_per_client"] / row["bare_ms_per_client"],
        "floor_ms_per_client": jobs.flops(job) / rate * 1e3,
        "gflops": rate / 1e9,
        "memory_mb": max(run["memory_mb"] for run in own),
        "model_sha256": own[0]["model_sha256"],
        "engine": own[0]["engine"],
        "variants": {" ".join(key).strip(): values for key, values in times.items()},
        "notes": notes,
    }


def stages(job: Job, experiment: Experiment) -> dict[str, float]:
    """Measure in a separate run FedVeil's milliseconds a client in each stage, the mean over the rounds."""
    run = run_once(fedveil(experiment, "--stages"))
    clients = len(run["round_s"]) * job.cohort
    return {name: seconds / clients * 1e3 for name, seconds in run["stages_s"].items()}


def judged(row: Measures, quantity: str, most: float) -> Measures:
    """Compare a measured quantity with its target, at most `most`; None where it was not measured."""
    found = row.get(quantity)
    return {"quantity": quantity, "most": most, "found": found, "reached": None if found is None else found <= most}
