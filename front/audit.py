"""`fedveil audit`: refute a run's differential privacy, or fail to, with canaries in the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.core.errors import SettingsError
from fedveil.options import AsJson, Assignments, DataDir, Quiet, experiment_of, use_data_dir

QUICK = 500  # canaries of --quick


def audit(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET | FILE.toml]", help="whose privacy is audited; digits with a small epsilon without it"
        ),
    ] = None,
    assignments: Assignments = None,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=100, metavar="N", help="how many; 4,000 without it, and more see more; 1,000 for unit example"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK:,} canaries: sees gross faults alone")] = False,
    seed: Annotated[int | None, typer.Option(help="of every random choice")] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the report; audits/NAME-TIMESTAMP without it")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Audit an experiment's epsilon: run it with canaries, and show how much of them got out.

    Ends with exit code 1 where a lower bound exceeds the claim, as clip, noise or accounting must be wrong then.
    """
    use_data_dir(data_dir)
    if quick and canaries is not None:
        raise SettingsError(f"--canaries {canaries}: not with --quick, which takes {QUICK:,}")
    console = None if quiet else Console(stderr=as_json)
    from fedveil.core.settings.experiment import parse_assignments
    from fedveil.simulations.audit.report import LIMITS, new_folder, rows, write_report
    from fedveil.simulations.audit.run import USUAL, usual_number
    from fedveil.simulations.audit.run import audit as run_audit

    experiment = experiment_of(preset or "digits", assignments, seed)
    if preset is None:
        given = parse_assignments(assignments or [])
        usual = {"federation.cohort": experiment.data.clients, **USUAL}
        if given.get("privacy.epsilon") is not None:
            del usual["privacy.noise_multiplier"]
        experiment = experiment.override({key: value for key, value in usual.items() if key not in given})
    number = canaries or (QUICK if quick else usual_number(experiment))
    folder = new_folder(out, experiment.name)
    if console:
        console.print(f"audit    {experiment.name}, with {number:,} canaries", highlight=False, markup=False)
    found = run_audit(experiment, folder / "run", canaries=number)
    page = write_report(folder, found)
    if as_json:
        typer.echo(json.dumps({**found.summary(), "report": str(page)}))
    elif console:
        for name, value, words in rows(found):
            console.print(f"{name:21} {value:>6}  {words}", highlight=False, soft_wrap=True, markup=False)
        console.print(found.verdict, style="bold red" if found.refuted else "bold", highlight=False, soft_wrap=True)
        for line in LIMITS:
            console.print(f"note     {line}", highlight=False, soft_wrap=True, markup=False)
        console.print(f"report   {page}  ({found.seconds:.0f} s)", highlight=False, soft_wrap=True, markup=False)
    if found.refuted:
        raise typer.Exit(1)
