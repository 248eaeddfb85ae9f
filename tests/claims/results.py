"""Measure every claim in full and write docs/results.md: `python -m claims.results docs/results.md`, with tests/ on PYTHONPATH."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import conftest  # noqa: F401  (where the real data is, and no telemetry)
from helpers.fuzzing import FILES, OWN_FILES, draw_fresh, throw
from helpers.kills import content, run_killed, stateful

import claims.attacks as attack_claims
import claims.audits as audit_claims
import claims.deployed as deployed_claims
import claims.loading as loading_claims
import claims.protected as protected_claims
from claims.presets import CLAIMS, Measured, measure
from claims.private import PRIVATE
from claims.protected import COMPARISONS, SEEDS, Runs
from fedveil import run

KILLS = 50
INPUTS = 100_000
CHANGES = 10_000
EVERY = [*CLAIMS, *PRIVATE]


def table(measured: dict[str, list[Measured]]) -> tuple[str, list[str]]:
    """The beginning of the page, from each claim's runs over its seeds, and the names of claims that do not hold."""
    rows, failed = [], []
    for claim in EVERY:
        numbers = [run.value for run in measured[claim.name]]
        middle = statistics.median(numbers)
        held = claim.holds(middle)
        failed += [] if held else [claim.name]
        seconds = statistics.median(run.seconds for run in measured[claim.name])
        each = ", ".join(f"{number:.4g}" for number in numbers)
        rows.append(
            f"| {claim.name} | {claim.what} | {claim.target} | **{middle:.4g}**{'' if held else ' (missed)'} | {each} | "
            f"{seconds:.0f} s | {claim.source} |"
        )
    return (
        f"""# Results

What the presets reach, measured by `make claims` on {date.today().isoformat()} with Python {platform.python_version()} on
{os.cpu_count()} CPU cores ({platform.machine()}) that other work shared. A number is the median over seeds 0, 1, 2, ...;
the test part is the same for every seed. How each preset came to its settings: [training.md](training.md).

| preset | measured | claim | median | each seed | time of a run | for comparison |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
""",
        failed,
    )


def compare(plain: dict[str, list[Measured]]) -> dict[str, Runs]:
    """All runs of the comparisons; `plain`: those in the clear that were measured already, by the claim's name."""
    found: dict[str, Runs] = {}
    for comparison in COMPARISONS:
        claim = comparison.claim
        runs = {"none": plain.get(claim.name) or measure(claim, range(claim.seeds), progress=_say)}
        for protection in comparison.protections:
            runs[protection] = measure(claim, range(SEEDS), protection=protection, progress=_say)
        found[claim.name] = runs
    return found


def survives(kills: int) -> bool:
    """Whether a run that is killed so often, and resumed, ends at the models and tables of one that never was."""
    experiment = stateful("batched", rounds=12 * kills)
    with tempfile.TemporaryDirectory() as folder:
        summary, _ = run_killed(experiment, Path(folder), kills, seed=0)
        whole = run(experiment, out=Path(folder) / "whole")
        same = content(Path(folder) / "run") == content(whole.run_dir)
    return same and summary["model_sha256"] == whole.summary["model_sha256"]


def survival(survived: bool) -> str:
    """The section on the killed run."""
    return f"""
## Never losing a run

A run of the digits (fedadam, plateau schedule, clients that evaluate), {12 * KILLS} rounds, killed with SIGKILL {KILLS} times and resumed
each time: model, best model, `metrics.csv`, `clients.csv` and the bytes in `ledger.csv` are {"" if survived else "not (missed) "}those of a run that was never killed.
"""


def parsing(stood: dict[str, bool], drawn: bool, inputs: int = INPUTS) -> str:
    """The section on random bytes."""
    names = ", ".join(f"`{name}`{'' if held else ' (missed)'}" for name, held in sorted(stood.items()))
    return f"""
## Random bytes

{inputs:,} random inputs for each parser of what another party sends or a key file holds, plain and in valid frames and damaged
messages: every one was refused with a reason, or read as what it says; none crashed or hung. Parsers: {names}.

All other tests that draw examples were run with fresh ones, {FILES:,} for each parser of files: {"passed" if drawn else "failed (missed)"}.
"""


def damaging(stood: dict[str, bool], changes: int = CHANGES) -> str:
    """The section on damaged files of a user's own."""
    names = ", ".join(
        f"{name.removeprefix('own ')}{'' if held else ' (missed)'}" for name, held in sorted(stood.items())
    )
    return f"""
## Damaged files of your own

{changes:,} files of each kind, changed at random: every one gave a clear error, or the value that an independent reader finds where
there is one; none a traceback or a warning. Kinds: {names}.
"""


def main(path: str) -> int:
    """Measure all, write the page, and return 1 where a claim does not hold."""
    survived = survives(KILLS)
    stood, own, drawn = throw(INPUTS), throw(CHANGES, OWN_FILES), draw_fresh()
    measured = {claim.name: measure(claim, range(claim.seeds), progress=_say) for claim in EVERY}
    text, failed = table(measured)
    protected, apart = protected_claims.section(compare(measured))
    loaded = loading_claims.measure()
    many = deployed_claims.measure(progress=_say)
    reached = attack_claims.measure(progress=_say)
    audits = audit_claims.measure(progress=_say)
    failed += [f"audit, {each.fault or 'right'}" for each in audits if not each.holds]
    failed += [] if many.holds else [f"{many.clients} deployed clients"]
    failed += [] if loaded.holds else ["loading"]
    failed += (
        reached.failed
        + apart
        + ([] if survived else [f"{KILLS} kills"])
        + [name for name, held in {**stood, **own}.items() if not held]
        + ([] if drawn else ["tests on fresh examples"])
    )
    rest = (
        survival(survived)
        + parsing(stood, drawn)
        + damaging(own)
        + loading_claims.section(loaded)
        + deployed_claims.section(many)
        + attack_claims.section(reached)
        + audit_claims.section(audits)
    )
    Path(path).write_text(text + protected + rest)
    print(f"written: {path}" + (f"; missed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
