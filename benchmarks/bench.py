"""What `fedveil bench` does: choose, measure, print, and write the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedveil.benchmarks import (
    contest,
    deployment,
    deployment_report,
    encryption,
    encryption_report,
    growth,
    jobs,
    report,
)
from fedveil.core.errors import SettingsError, nearest

GROWTH, ENCRYPTION, DEPLOYMENT = "growth", "encryption", "deployment"


def bench(
    name: str | None = None,
    *,
    settings: dict[str, Any],
    peers: dict[str, Path | None],
    repeats: int = 3,
    as_json: bool = False,
    write: Path | None = None,
    command: Sequence[str] = (),
) -> None:
    """Measure a job, all jobs (no name), how cost grows (`growth`), what protection costs (`encryption`), or a deployed round.

    Prints a table or one JSON object.

    settings: changes to every experiment, `engine` and `workers` say; none where clients are processes of their own
    peers: by name, the Python of its environment; None for the conventional place; of the jobs alone
    repeats: runs of each contestant
    write: a page whose measured section is replaced
    Raises SettingsError before anything is measured; FedveilError where a run fails.
    """
    known = (*jobs.JOBS, GROWTH, ENCRYPTION, DEPLOYMENT)
    if name not in (None, *known):
        raise SettingsError(f"bench: there is no job '{name}'{nearest(str(name), known)}\n  known: {', '.join(known)}")
    if name == DEPLOYMENT and settings:
        raise SettingsError(f"--{next(iter(settings))}: deployed clients are processes of their own; leave it out")
    if write is not None:
        if name in jobs.JOBS:
            raise SettingsError(f"--write {write}: the page holds all jobs; name no job, or {', '.join(known[-3:])}")
        report.check_page(write, name or "jobs")
    console = Console(stderr=as_json)
    around = report.surroundings(command)
    if name == GROWTH:
        _growth(settings, around, console, as_json, write)
    elif name == ENCRYPTION:
        _encryption(settings, repeats, around, console, as_json, write)
    elif name == DEPLOYMENT:
        _deployment(repeats, around, console, as_json, write)
    else:
        _jobs(name, settings, peers, repeats, around, console, as_json, write)


def _jobs(
    name: str | None,
    settings: dict[str, Any],
    peers: dict[str, Path | None],
    repeats: int,
    around: contest.Measures,
    console: Console,
    as_json: bool,
    write: Path | None,
) -> None:
    chosen = [jobs.JOBS[name]] if name else list(jobs.JOBS.values())
    experiments = {job: jobs.experiment(job).override(settings) for job in chosen}
    found, notes = contest.find_peers(peers)
    _say(console, notes)
    rows = []
    for job, experiment in experiments.items():
        listed = contest.entries(job, experiment, found)
        row = contest.compare(job, listed, repeats, lambda line: _say(console, [line]))
        rows.append(row | {"stages_ms": contest.stages(job, experiment)})
    if as_json:
        measured = rows[0] if name else {"jobs": rows}
        print(json.dumps({**measured, "notes": [*notes, *measured.get("notes", [])], "repeats": repeats, **around}))
    else:
        console.print(report.table(rows, notes), highlight=False)
    if write is not None:
        report.write_section(write, "jobs", report.jobs_section(rows, notes, around, repeats))


def _growth(
    settings: dict[str, Any], around: contest.Measures, console: Console, as_json: bool, write: Path | None
) -> None:
    rows = growth.measure(settings, lambda line: _say(console, [line]))
    if as_json:
        print(json.dumps({"growth": rows, **around}))
    else:
        console.print(report.growth_table(rows), highlight=False)
    if write is not None:
        growth.draw(rows, write.parent / report.PICTURE)
        report.write_section(write, GROWTH, report.growth_section(rows, around))


def _encryption(
    settings: dict[str, Any],
    repeats: int,
    around: contest.Measures,
    console: Console,
    as_json: bool,
    write: Path | None,
) -> None:
    found = encryption.measure(settings, repeats, lambda line: _say(console, [line]))
    if as_json:
        print(json.dumps({**found, "repeats": repeats, **around, "versions": around["versions"] | found["versions"]}))
    else:
        console.print(encryption_report.table(found), highlight=False)
    if write is not None:
        report.write_section(write, ENCRYPTION, encryption_report.section(found, around, repeats))


def _deployment(repeats: int, around: contest.Measures, console: Console, as_json: bool, write: Path | None) -> None:
    found = deployment.measure(repeats, lambda line: _say(console, [line]))
    if as_json:
        print(json.dumps({**found, "repeats": repeats, **around}))
    else:
        console.print(deployment_report.table(found), highlight=False)
    if write is not None:
        report.write_section(write, DEPLOYMENT, deployment_report.section(found, around, repeats))


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
