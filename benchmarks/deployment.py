"""The cost of a deployed round, beside a bare Flower app: seconds by part, bytes sent, and memory.

All parties run on this machine: FedVeil's over TLS with registered keys, Flower's without, which costs it less. The
first round does not count, nor does FedVeil's last one, in which the server evaluates.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.bare_app import BareRun, run_bare
from benchmarks.contest import Measures, judged
from benchmarks.deployed import SERVER, Deployed, run_deployed
from benchmarks.party import ARRIVED, CALL, PUSHED, RECEIVED, TRAINED, Note
from fedveil.core.errors import DataError, FedveilError
from fedveil.core.settings.experiment import Experiment
from fedveil.remote import vocabulary

CLIENTS = 3
ROUNDS, BARE_ROUNDS = 12, 6  # the first round is not counted, nor is FedVeil's last one
PARTS = ("push", "dispatch", "start", "training", "upload", "aggregation")
SAID = {"round_s": "seconds a round", "wire_ratio": "bytes on the wire, of the ledger's"}


@dataclass(frozen=True)
class Job:
    """A preset, and the same work as the bare app takes it (`peers/flower_app.py`)."""

    preset: str
    bare: Mapping[str, Any]

    @property
    def experiment(self) -> Experiment:
        """The preset with CLIENTS clients, all of them in each round."""
        sizes = {"data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": ROUNDS}
        return Experiment.preset(self.preset).override({**sizes, "evaluation.every": ROUNDS})


JOBS = (
    Job("digits", {"model": "mlp", "layers": [64, 128, 64, 10], "epochs": 5, "batch_size": 10}),
    Job("sms-lstm", {"model": "lstm", "words": 4000, "tokens": 64, "epochs": 1, "batch_size": 16}),
)


@dataclass(frozen=True)
class Target:
    """A target: a job's `quantity`, a key of SAID, is at most `most`."""

    job: str
    quantity: str
    most: float


TARGETS = tuple(
    Target(job.preset, quantity, most) for quantity, most in (("round_s", 3.0), ("wire_ratio", 1.1)) for job in JOBS
)


def measure(repeats: int, progress: Callable[[str], None] = lambda _: None) -> Measures:
    """Measure each of JOBS by FedVeil and the bare app in turn; return a row for each, and which targets are reached.

    Raises FedveilError where a run fails; a job whose data are not on this machine is left out, and `notes` says why.
    """
    rows, notes = [], []
    for job in JOBS:
        try:
            vocabulary(job.experiment)
        except DataError as error:
            notes.append(f"{job.preset}: not measured: {str(error).splitlines()[0]}")
            continue
        own, bare = [], []
        for turn in range(1, repeats + 1):
            own.append(measure_own(job))
            progress(f"{job.preset} {turn}/{repeats}  FedVeil: {own[-1]['round_s']:.3g} s a round")
            bare.append(measure_bare(job, own[-1]["examples"]))
            progress(f"{job.preset} {turn}/{repeats}  bare Flower: {bare[-1]['round_s']:.3g} s a round")
        rows.append(side_by_side(job.preset, own, bare))
    found = {row["job"]: row for row in rows}
    return {
        "job": "deployment",
        "clients": CLIENTS,
        "rows": rows,
        "targets": judge(found),
        "notes": notes,
    }


def measure_own(job: Job) -> Measures:
    """Measure one run of FedVeil."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_deployed(job.experiment, job.experiment.data.dataset.name, CLIENTS, Path(folder))
    return figures(run)


def figures(run: Deployed) -> Measures:
    """Return a run's figures: medians over the rounds that count; bytes for each client and round.

    `calls` are those of clients to the server, and `connections` those made for them, for each client and round.
    """
    last = max(run.ends)
    counted = {number for number in run.ends if 1 < number < last}
    begin, end = run.ends[1], run.ends[last - 1]
    messages = len(counted) * CLIENTS
    wire_up, wire_down, connections = run.wire(begin, end)
    payload_up, payload_down = run.payload(counted)
    calls = sum(note.what == CALL and begin <= note.when < end for note in run.notes)
    memory = run.memory(end)
    return {
        "round_s": statistics.median(run.ends[number] - run.ends[number - 1] for number in counted),
        "parts_s": medians(own_parts(run.notes, run.ends[number - 1], run.ends[number]) for number in counted),
        "wire_up": wire_up / messages,
        "wire_down": wire_down / messages,
        "payload_up": payload_up / messages,
        "payload_down": payload_down / messages,
        "wire_ratio": (wire_up + wire_down) / (payload_up + payload_down),
        "calls": calls / messages,
        "connections": connections / messages,
        **_memory(memory),
        "examples": max(int(row["examples"]) for row in run.clients),
    }


def own_parts(notes: Iterable[Note], begin: float, end: float) -> dict[str, float]:
    """Return the seconds of each part of a round of FedVeil, for the client whose reply came last; `start` is 0.

    Raises FedveilError where the notes do not tell them.
    """
    found = [note for note in notes if begin <= note.when < end]
    arrivals = [note for note in found if note.what == ARRIVED]
    last = max(arrivals, key=lambda note: note.when, default=None)
    try:
        assert last is not None
        pushed = next(note.when for note in found if note.what == PUSHED)
        received, trained = (
            next(note.when for note in found if (note.what, note.client) == (what, last.client))
            for what in (RECEIVED, TRAINED)
        )
    except (AssertionError, StopIteration, RuntimeError):
        raise FedveilError(f"benchmark: nothing tells what happened between {begin:.3f} and {end:.3f}") from None
    # a client that polls may have its message before all messages are ready
    return _parts(begin, min(pushed, received), received, received, trained, last.when, end)


def measure_bare(job: Job, examples: int) -> Measures:
    """Measure one run of the bare app."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_bare({**job.bare, "examples": examples, "clients": CLIENTS, "rounds": BARE_ROUNDS}, Path(folder))
    return bare_figures(run)


def bare_figures(run: BareRun) -> Measures:
    """Return the figures of a bare run, as `figures` does; raise FedveilError where a round lacks a client."""
    if any(each["replies"] < CLIENTS for each in run.rounds):
        raise FedveilError(
            f"benchmark: the bare Flower app lost a client: {[each['replies'] for each in run.rounds]} replied"
        )
    ends = [each["end"] for each in run.rounds]
    order = ("pushed", "started", "ready", "trained", "gathered", "end")
    return {
        "round_s": statistics.median(after - before for before, after in pairwise(ends)),
        "parts_s": medians(
            _parts(before, *(each[key] for key in order)) for before, each in zip(ends, run.rounds[1:], strict=False)
        ),
        **_memory(run.memory),
    }


def side_by_side(job: str, own: Sequence[Measures], bare: Sequence[Measures]) -> Measures:
    """Return a job's row: medians over the runs, least and most of the quoted figure, the bare app's as `bare_...`."""
    row: Measures = {"job": job}
    for prefix, runs in (("", own), ("bare_", bare)):
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[f"{prefix}{key}"] = medians(values) if key == "parts_s" else statistics.median(values)
        row[f"{prefix}round_s_range"] = [min(run["round_s"] for run in runs), max(run["round_s"] for run in runs)]
    return row | {"speedup": row["bare_round_s"] / row["round_s"]}


def medians(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each part."""
    columns: dict[str, list[float]] = defaultdict(list)
    for parts in found:
        for name, seconds in parts.items():
            columns[name].append(seconds)
    return {name: statistics.median(values) for name, values in columns.items()}


def _parts(*moments: float) -> dict[str, float]:
    """Return the seconds of each of PARTS, from the moments between them."""
    return {name: after - before for name, (before, after) in zip(PARTS, pairwise(moments), strict=True)}


def _memory(peaks: Mapping[str, float]) -> Measures:
    """Return the server's peak, and the largest peak of a client, in MB."""
    return {
        "server_mb": peaks[SERVER],
        "client_mb": max(peak for name, peak in peaks.items() if name != SERVER),
    }


def judge(found: Mapping[str, Measures]) -> list[Measures]:
    """Compare TARGETS with what was found of each job."""
    return [
        {"job": target.job, **judged(found.get(target.job, {}), target.quantity, target.most)} for target in TARGETS
    ]
