"""The work of `python -m benchmarks`: choose, measure, print, and write the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import (
    contest,
    deployment,
    deployment_report,
    encryption,
    encryption_report,
    gpu,
    growth,
    jobs,
    noise,
    private_steps,
    report,
)
from fedveil.core.errors import SettingsError, nearest

GROWTH, ENCRYPTION, NOISE, DEPLOYMENT, PRIVATE, GPU = "growth", "encryption", "noise", "deployment", "private", "gpu"
ALL = (*jobs.JOBS, GROWTH, ENCRYPTION, NOISE, DEPLOYMENT, PRIVATE)  # what is measured where no name is given
KNOWN = (*ALL, GPU)


def bench(
    names: Sequence[str] = (),
    *,
    settings: dict[str, Any],
    peers: dict[str, Path | None],
    repeats: int = 3,
    as_json: bool = False,
    write: Path | None = None,
    command: Sequence[str] = (),
) -> None:
    """Measure jobs, how cost grows (`growth`), what protection costs (`encryption`), what exact noise costs (`noise`),
    a deployed round (`deployment`), a step of DP-SGD (`private`), a GPU (`gpu`).

    Prints tables, or one JSON object: the figures of one name, or an object of figures by name.

    names: all of them but `gpu` where it is empty
    settings: changes to every experiment, such as `engine` and `workers`; none for `deployment` and `gpu`
    peers: by name, the Python of a peer's environment; None for the conventional path; used by jobs alone
    repeats: runs of each contestant
    write: a page whose measured sections are replaced
    Raises SettingsError before anything is measured; FedveilError where a run fails.
    """
    for name in names:
        if name not in KNOWN:
            raise SettingsError(f"bench: there is no job '{name}'{nearest(name, KNOWN)}\n  known: {', '.join(KNOWN)}")
    asked = [name for name in KNOWN if name in (names or ALL)]
    chosen, others = [jobs.JOBS[name] for name in asked if name in jobs.JOBS], [n for n in asked if n not in jobs.JOBS]
    if DEPLOYMENT in asked and settings:
        raise SettingsError(
            f"--{next(iter(settings))}: deployed clients are processes of their own; leave it out, or name other jobs"
        )
    if GPU in asked:
        gpu.check(settings)
    if write is not None:
        if chosen and len(chosen) < len(jobs.JOBS):
            raise SettingsError(
                f"--write {write}: the page holds all jobs; name {', '.join(jobs.JOBS)} or none of them"
            )
        for section in (*(["jobs"] if chosen else []), *others):
            report.check_page(write, section)
    console = Console(stderr=as_json)
    around = report.surroundings(command)
    shown = None if as_json else console
    measured: contest.Measures = {}
    if chosen:
        measured |= _jobs(chosen, settings, peers, repeats, around, console, shown, write)
    if GROWTH in others:
        measured[GROWTH] = _growth(settings, around, console, shown, write)
    if ENCRYPTION in others:
        measured[ENCRYPTION] = _encryption(settings, repeats, around, console, shown, write)
    if NOISE in others:
        measured[NOISE] = _noise(repeats, around, console, shown, write)
    if DEPLOYMENT in others:
        measured[DEPLOYMENT] = _deployment(repeats, around, console, shown, write)
    if PRIVATE in others:
        measured[PRIVATE] = _private(repeats, around, console, shown, write)
    if GPU in others:
        measured[GPU] = _gpu(around, console, shown, write)
    if as_json:
        if len(asked) == 1 and asked[0] != GROWTH:
            (found,) = measured.pop("jobs", None) or [measured.pop(asked[0])]
            notes = [*measured.get("notes", []), *found.get("notes", [])]
            versions = {"versions": around["versions"] | found.get("versions", {})}
            measured = {**found, "notes": notes}
            around |= versions
        print(json.dumps({**measured, "repeats": repeats, **around}))


def _jobs(
    chosen: Sequence[jobs.Job],
    settings: dict[str, Any],
    peers: dict[str, Path | None],
    repeats: int,
    around: contest.Measures,
    console: Console,
    shown: Console | None,
    write: Path | None,
) -> contest.Measures:
    experiments = {job: jobs.experiment(job).override(settings) for job in chosen}
    found, notes = contest.find_peers(peers)
    _say(console, notes)
    rows = []
    for job, experiment in experiments.items():
        listed = contest.entries(job, experiment, found)
        row = contest.compare(job, listed, repeats, lambda line: _say(console, [line]))
        rows.append(row | {"stages_ms": contest.stages(job, experiment)})
    if shown:
        shown.print(report.table(rows, notes), highlight=False)
    if write is not None:
        report.write_section(write, "jobs", report.jobs_section(rows, notes, around, repeats))
    return {"jobs": rows, "notes": notes}


def _growth(
    settings: dict[str, Any], around: contest.Measures, console: Console, shown: Console | None, write: Path | None
) -> list[contest.Measures]:
    rows = growth.measure(settings, lambda line: _say(console, [line]))
    if shown:
        shown.print(report.growth_table(rows), highlight=False)
    if write is not None:
        growth.draw(rows, write.parent / report.PICTURE)
        report.write_section(write, GROWTH, report.growth_section(rows, around))
    return rows


def _encryption(
    settings: dict[str, Any],
    repeats: int,
    around: contest.Measures,
    console: Console,
    shown: Console | None,
    write: Path | None,
) -> contest.Measures:
    found = encryption.measure(settings, repeats, lambda line: _say(console, [line]))
    if shown:
        shown.print(encryption_report.table(found), highlight=False)
    if write is not None:
        report.write_section(write, ENCRYPTION, encryption_report.section(found, around, repeats))
    return found


def _noise(
    repeats: int, around: contest.Measures, console: Console, shown: Console | None, write: Path | None
) -> contest.Measures:
    found = noise.measure(repeats, lambda line: _say(console, [line]))
    if shown:
        shown.print(report.tables(noise.grids(found), found["notes"]), highlight=False)
    if write is not None:
        report.write_section(write, NOISE, noise.section(found, around, repeats))
    return found


def _deployment(
    repeats: int, around: contest.Measures, console: Console, shown: Console | None, write: Path | None
) -> contest.Measures:
    found = deployment.measure(repeats, lambda line: _say(console, [line]))
    if shown:
        shown.print(deployment_report.table(found), highlight=False)
    if write is not None:
        report.write_section(write, DEPLOYMENT, deployment_report.section(found, around, repeats))
    return found


def _private(
    repeats: int, around: contest.Measures, console: Console, shown: Console | None, write: Path | None
) -> contest.Measures:
    found = private_steps.measure(repeats, lambda line: _say(console, [line]))
    if shown:
        shown.print(report.tables(private_steps.grids(found), found["notes"]), highlight=False)
    if write is not None:
        report.write_section(write, PRIVATE, private_steps.section(found, around, repeats))
    return found


def _gpu(around: contest.Measures, console: Console, shown: Console | None, write: Path | None) -> contest.Measures:
    found = gpu.measure(lambda line: _say(console, [line]))
    if shown:
        shown.print(report.tables(gpu.grids(found), found["notes"]), highlight=False)
    if write is not None:
        report.write_section(write, GPU, gpu.section(found, around))
    return found


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
