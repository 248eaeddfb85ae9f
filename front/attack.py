"""`fedveil attack`: measure what an observer learns from an experiment or a recorded run, beside guessing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedveil.core.errors import SettingsError
from fedveil.options import AsJson, Assignments, DataDir, Quiet, experiment_of, use_data_dir

DEFAULTS = {"words": "spam-demo", "order": "spam-demo", "coverage": "spam-demo"}  # offline, as `digits` is


def attack(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="an attack, see `fedveil list attacks`; or matrix"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET | FILE.toml]", help="whose clients are attacked; made-up messages or digits without it"
        ),
    ] = None,
    assignments: Assignments = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="attack what was captured of this run, not clients made for it; twice: compare two runs"
        ),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="server, malicious-server, aggregate, malicious-aggregate, client, key-holder, two-runs, "
            "two-deployed-runs or wire",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="how often; scores are means over them")] = 50,
    after: Annotated[int, typer.Option(min=0, metavar="ROUNDS", help="train the experiment so long before")] = 0,
    seed: Annotated[int | None, typer.Option(help="of every random choice")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="matrix: fewer attacks, trials and protections")] = False,
    more: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="MODULE:OBJECT", help="matrix: an attack or a defence of your own; repeatable"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the report; attacks/NAME-TIMESTAMP without it")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack an experiment's clients, or a recorded run, and measure what leaks.

    `fedveil attack words` alone reads made-up messages out of one update each, as chapter 15 of 'Grokking Deep Learning' does.
    """
    use_data_dir(data_dir)
    console = None if quiet else Console(stderr=as_json)
    against = against or None
    if name is None and against is None:
        raise SettingsError("attack: name one, see `fedveil list attacks`; or name a run with --against")
    own, assignments = _own_settings(assignments or [])
    if own and name in (None, "matrix"):
        raise SettingsError(f"attack.{next(iter(own))}: name the attack whose setting it is")
    if against is not None and (preset or assignments or seed is not None or after):
        raise SettingsError("--against: attacks a run as it was; no preset, --set, --seed or --after goes with it")
    if name == "matrix":
        if preset or assignments or against or observer or after:
            raise SettingsError(
                "attack matrix: has settings of its own; it takes --quick, --with, --seed, --out and --json"
            )
        _matrix(quick, more or [], seed or 0, out, console, as_json)
        return
    if quick or more:
        raise SettingsError("--quick, --with: only with `fedveil attack matrix`")
    from fedveil.core.settings.experiment import parse_assignments, resumable

    if against is not None:
        if len(against) > 2:
            raise SettingsError(f"--against: names {len(against)} runs; an attack looks at one, or compares two")
        experiment = resumable(against[0], "--against")
    else:
        experiment = experiment_of(preset or DEFAULTS.get(str(name), "digits"), assignments, seed)
    # the batch size of victims is not for the rounds that are trained before
    others = [word for word in assignments or [] if not word.startswith("training.batch_size")]
    warm = experiment_of(preset or DEFAULTS.get(str(name), "digits"), others, seed) if after else None
    from fedveil.simulations.attacks.lab.display import progress, show
    from fedveil.simulations.attacks.lab.lab import attack as run_attack
    from fedveil.simulations.attacks.lab.lab import find_attack, fitting
    from fedveil.simulations.attacks.lab.report import new_folder, write_report

    if against is not None and len(against) == 2:
        observer = observer or "two-runs"
    names = [name] if name else fitting(experiment, observer)
    if console and not name:
        costs = ", ".join(f"{each} ({find_attack(each).cost})" for each in names)
        console.print(f"attacks  {costs}", highlight=False, soft_wrap=True, markup=False)
    asked = frozenset(parse_assignments(assignments or []))
    folder = new_folder(out, name or "against")
    outcomes: list[Any] = []
    for each in names:
        with progress(console, each) as tell:
            outcome = run_attack(
                each,
                experiment,
                settings=own,
                observer=observer,
                trials=trials,
                after=after,
                warm=warm,
                asked=asked,
                against=against,
                progress=tell,
            )
        outcomes.append(outcome)
        if console and not as_json:
            show(outcome, console)
    page = write_report(folder, outcomes)
    if console and not as_json:
        console.print(f"report   {page}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        summaries = [{**outcome.summary(), "report": str(page)} for outcome in outcomes]
        typer.echo(json.dumps(summaries[0] if name else summaries))


def _own_settings(assignments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The attack's own settings, `attack.KEY=VALUE`, by their names; and the assignments that are the experiment's."""
    from fedveil.core.settings.experiment import parse_assignments

    own = [word for word in assignments if word.startswith("attack.")]
    given = parse_assignments(own)
    settings = {key.removeprefix("attack."): value for key, value in given.items() if value is not None}
    return settings, [word for word in assignments if word not in own]


def list_attacks(console: Console) -> None:
    """Print what each attack recovers, needs to see, costs and cites, and what each observer sees."""
    from rich.table import Table

    from fedveil.core.catalog import ATTACKS
    from fedveil.simulations.attacks.lab.observers import OBSERVERS

    for name, description in ATTACKS.items():
        console.print(f"[bold]{name}[/]  {description}", highlight=False, soft_wrap=True)
        console.print(attack_words(name), highlight=False, soft_wrap=True)
    console.print("\n[bold]observers[/]")
    grid = Table(box=None, show_header=False, pad_edge=False)
    for name, observer in OBSERVERS.items():
        grid.add_row(f"  {name}", observer.knows)
    console.print(grid)


def attack_words(name: str) -> str:
    """What an attack needs to see, what it costs, and who found it, in three lines."""
    from fedveil.simulations.attacks.lab.attack import NEEDS
    from fedveil.simulations.attacks.lab.lab import find_attack

    found = find_attack(name)
    needs = ", ".join(NEEDS[need] for need in found.needs)
    return f"  sees   {needs}\n  takes  {found.cost}\n  cites  {found.cites}"


def _matrix(quick: bool, more: list[str], seed: int, out: Path | None, console: Console | None, as_json: bool) -> None:
    """Run `fedveil attack matrix`."""
    import time

    from fedveil.core.record.record import write_atomically
    from fedveil.simulations.attacks.lab import budgets, matrix
    from fedveil.simulations.attacks.lab.report import new_folder, write_report

    folder, started = new_folder(out, "matrix"), time.perf_counter()

    def tell(cell: matrix.Cell, done: int, total: int) -> None:
        if console:
            words = cell.words if cell.outcome is not None else cell.why
            console.print(
                f"{done:>3}/{total}  {cell.row.name}, {cell.column.name}: {words}", highlight=False, markup=False
            )

    cells = matrix.measure(quick=quick, more=more, seed=seed, progress=tell)
    # the page shows what was recovered without protection; the heat map has the other columns too
    open_to_all = [cell.outcome for cell in cells if cell.outcome is not None and cell.column == cells[0].column]

    def say(text: str) -> None:
        if console:
            console.print(f"         {text}", highlight=False, markup=False)

    bought = budgets.measure(cells, seed, say)
    page = write_report(folder, open_to_all, matrix.picture(cells), budgets.picture(bought))
    write_atomically(folder / "matrix.csv", matrix.as_csv(cells))
    write_atomically(folder / "budgets.csv", budgets.as_csv(bought))
    seconds = time.perf_counter() - started
    if as_json:
        rows = [
            {"row": cell.row.name, "column": cell.column.name, **(cell.outcome.summary() if cell.outcome else {"why": cell.why})}
            for cell in cells
        ]  # fmt: skip
        measured = [
            {**asdict(each), "epsilon": each.epsilon if math.isfinite(each.epsilon) else None} for each in bought
        ]
        said = {"cells": rows, "budgets": measured, "seconds": seconds, "report": str(page)}
        typer.echo(json.dumps(said))
    elif console:
        for line in matrix.legend(cells):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        Console(width=max(console.width, 120)).print(matrix.table(cells))
        console.print(budgets.table(bought))
        console.print(f"report   {page}  ({seconds:.0f} s)", highlight=False, soft_wrap=True, markup=False)
