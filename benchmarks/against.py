"""The comparison of two installed versions of FedVeil, in turn on the same jobs and the same machine."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import jobs
from benchmarks.contest import Entry, Measures, ms_per_client, run_once
from benchmarks.jobs import Job
from benchmarks.report import short, surroundings
from fedveil.core.errors import SettingsError, nearest

SCRIPT = Path(__file__).with_name("peers") / "any_fedveil.py"


def against(
    names: Sequence[str], python: Path, *, settings: dict[str, Any], repeats: int = 3, as_json: bool = False
) -> list[Measures]:
    """Run each job with the FedVeil here and with the one of `python`, in turn, and print the ratio of their medians.

    names: of jobs, all of them where it is empty; settings: changes to every experiment, such as `engine` and `workers`
    repeats: runs of each version; the version that begins changes from turn to turn
    Raises SettingsError before anything is measured; FedveilError where a run fails.
    """
    unknown = [name for name in names if name not in jobs.JOBS]
    if unknown:
        raise SettingsError(
            f"--against: '{unknown[0]}' is no job that two versions run{nearest(unknown[0], jobs.JOBS)}\n"
            f"  known: {', '.join(jobs.JOBS)}"
        )
    if not python.is_file():
        raise SettingsError(
            f"--against {python}: is no Python; give the one of an environment that has another FedVeil"
        )
    console = Console(stderr=as_json)
    rows = []
    for name in names or jobs.JOBS:
        job = jobs.JOBS[name]
        runs: tuple[list[Measures], list[Measures]] = ([], [])
        sides = (entry(job, settings, Path(sys.executable)), entry(job, settings, python.absolute()))
        for turn in range(repeats):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                run = run_once(sides[side])
                runs[side].append(run)
                spent = short(ms_per_client(run, job.cohort))
                which = ("here", "there")[side]
                console.print(
                    f"{name} {turn + 1}/{repeats}  {which} ({run['version']}): {spent} ms a client", highlight=False
                )
        rows.append(_row(job, *runs))
    if as_json:
        print(
            json.dumps(
                {"against": rows, "repeats": repeats, **surroundings(["python", "-m", "benchmarks", *sys.argv[1:]])}
            )
        )
    else:
        console.print(_table(rows), highlight=False)
        for word, where in zip(("here", "there"), rows[-1]["installed"], strict=True):
            console.print(f"{word}  {where}", highlight=False, soft_wrap=True, markup=False)
    return rows


def entry(job: Job, settings: dict[str, Any], python: Path) -> Entry:
    """Return the entry that runs a job on the FedVeil that `python` finds."""
    command = (str(python), str(SCRIPT), json.dumps(jobs.plain(job)), json.dumps(settings))
    return Entry("fedveil", str(python), command, environment={"PYTHONPATH": None})


def _row(job: Job, here: list[Measures], there: list[Measures]) -> Measures:
    """Return the medians of both, their ratio (below 1: faster here), and whether they made the same model."""
    times = [[ms_per_client(run, job.cohort) for run in runs] for runs in (here, there)]
    firsts = [statistics.median(run["first_round_s"] for run in runs) for runs in (here, there)]
    middle = [statistics.median(found) for found in times]
    return {
        "job": job.name,
        "ms_per_client": middle[0],
        "against_ms_per_client": middle[1],
        "ratio": middle[0] / middle[1],
        "least_ratio": min(times[0]) / min(times[1]),  # of the fastest runs, which other processes disturb least
        "runs": times[0],
        "against_runs": times[1],
        "first_round_s": firsts[0],
        "against_first_round_s": firsts[1],
        "engine": here[-1]["engine"],
        "versions": [here[-1]["version"], there[-1]["version"]],
        "installed": [here[-1]["installed"], there[-1]["installed"]],
        "same_model": len({run["model_sha256"] for run in (*here, *there)}) == 1,
    }


def _table(rows: Sequence[Measures]) -> Table:
    headings = ("job", "here", "there", "ratio", "of the fastest", "first round, s", "there", "engine", "same model")
    grid = Table(title="ms a client, whole rounds; a ratio below 1: faster here", title_justify="left", box=None)
    for i, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if i in (0, 7, 8) else "right")
    for row in rows:
        grid.add_row(
            row["job"], short(row["ms_per_client"]), short(row["against_ms_per_client"]), f"{row['ratio']:.3f}",
            f"{row['least_ratio']:.3f}", f"{row['first_round_s']:.1f}", f"{row['against_first_round_s']:.1f}",
            row["engine"], "yes" if row["same_model"] else "NO",
        )  # fmt: skip
    return grid
