"""The command line. It parses and prints; heavy imports wait inside the commands until they are needed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

from fedveil import __version__, attack, keys, machines
from fedveil.core import parts
from fedveil.core.errors import DataError, FedveilError, SettingsError, nearest
from fedveil.core.settings.legacy import OldKey
from fedveil.options import Assignments, DataDir, PresetOrFile, experiment_of, use_data_dir

app = typer.Typer(
    help="Federated learning that a person can run, deploy and attack.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Data sets: where they are, fetching, checking, and who holds what.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(keys.app, name="keys")
app.command("attack")(attack.attack)

TABLES = {
    "presets": parts.PRESETS,
    "datasets": parts.DATASETS,
    "partitions": parts.PARTITIONS,
    "models": parts.MODELS,
    "strategies": parts.STRATEGIES,
    "protections": parts.PROTECTIONS,
    "defences": parts.DEFENCES,
    "attacks": parts.ATTACKS,
}


@app.command()
def run(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET | FILE.toml]", help="what to run, digits without it; see `fedveil list presets`"
        ),
    ] = None,
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="of every random choice; same seed, same bytes")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (auto is cpu) or cuda")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, batched, sequential, processes or ray")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="processes that compute; changes the time and nothing else")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the record; runs/NAME-TIMESTAMP without it")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="go on with an interrupted run in its folder")
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="SERVER", help="run on a `fedveil server`, as in localhost, with its clients")
    ] = None,
    flower_app: Annotated[
        Path | None, typer.Option("--app", metavar="DIR", help="run the Flower app in this folder instead of a preset")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(metavar="N", help="with --app: how many; else what its Flower configuration says, or 10"),
    ] = None,
    data_dir: DataDir = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved settings as TOML, and run nothing")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object at the end; progress to standard error")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Train a federated model: a preset, or an experiment of your own.

    Without a name it trains `digits`: real handwritten digits, no download, seconds.
    """
    if flower_app is not None:
        words = {
            preset or "": preset, "--engine": engine, "--workers": workers, "--device": device, "--out": out,
            "--resume": resume, "--data-dir": data_dir, "--show": show,
        }  # fmt: skip
        unfit = [word for word, given in words.items() if given is not None and given is not False]
        if unfit:
            raise SettingsError(
                f"{', '.join(unfit)}: not with --app; a Flower app brings its own data, models and files, and its clients "
                "run one after another in this process. It takes --set, --clients, --seed, --json and --quiet"
            )
        _run_app(flower_app, assignments, clients, seed, as_json, quiet)
        return
    if on is not None:
        _run_on(on, preset, assignments, seed, device, resume, [engine, workers, out], as_json, quiet, show)
        return
    if clients is not None:
        raise SettingsError(f"--clients {clients}: only with --app; use --set data.clients={clients}")
    use_data_dir(data_dir)
    if resume is not None:
        from fedveil.core.experiment import resumable

        if preset or assignments or seed is not None or device or engine or out:
            raise SettingsError(
                "--resume: goes on with the run in that folder and its own settings; of the others only --workers, --data-dir, "
                "--json and --quiet go with it"
            )
        experiment = resumable(resume).override({"workers": workers})
    else:
        experiment = experiment_of(preset or "digits", assignments, seed, device=device, engine=engine, workers=workers)
    if show:
        typer.echo(experiment.toml(), nl=False)
        return
    console = None if quiet else Console(stderr=as_json)
    if console:
        console.print(f"fedveil {__version__}  {experiment.name}", highlight=False, markup=False)
    from fedveil.simulations.display import Display
    from fedveil.simulations.run import run as run_experiment

    result = run_experiment(
        experiment, out=out, resume=resume, display=Display(console), command=["fedveil", *sys.argv[1:]]
    )
    if as_json:
        typer.echo(json.dumps(result.summary))
    elif console:
        from fedveil.simulations.display import summary_text

        console.print(summary_text(result), highlight=False, soft_wrap=True, markup=False)


def _run_on(
    server: str,
    preset: str | None,
    assignments: list[str] | None,
    seed: int | None,
    device: str | None,
    resume: Path | None,
    unfit: list[object],
    as_json: bool,
    quiet: bool,
    show: bool,
) -> None:
    """`fedveil run --on`."""
    from fedveil.machines import run_on

    if any(given is not None for given in unfit):
        raise SettingsError(
            "--engine, --workers, --out: not with --on; clients compute each on their own machine, and the record "
            "is on the server's"
        )
    if resume is not None and (preset or assignments or seed is not None or device):
        raise SettingsError("--resume: goes on with the run of that name on the server, and its own settings")
    experiment = None if resume is not None else experiment_of(preset or "digits", assignments, seed, device=device)
    if show and experiment is not None:
        typer.echo(experiment.toml(), nl=False)
        return
    run_on(server, experiment, None if resume is None else str(resume), as_json, quiet)


def _run_app(
    folder: Path, assignments: list[str] | None, clients: int | None, seed: int | None, as_json: bool, quiet: bool
) -> None:
    """Run somebody else's Flower app; with --json, what it prints goes to standard error."""
    import logging
    from contextlib import nullcontext, redirect_stdout

    from fedveil.core.experiment import parse_assignments
    from fedveil.simulations.apps import run_app, summary_text

    if quiet:
        logging.getLogger("flwr").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        summary = run_app(folder, parse_assignments(assignments or []), clients=clients, seed=seed)
    if as_json:
        typer.echo(json.dumps(summary))
    elif not quiet:
        typer.echo(summary_text(summary))


@app.command("list")
def list_parts(
    kind: Annotated[str | None, typer.Argument(help=", ".join(TABLES))] = None,
) -> None:
    """List what FedVeil has: presets, datasets, partitions, models, strategies, protections, defences, attacks."""
    from rich.table import Table

    if kind is not None and kind not in TABLES:
        raise SettingsError(f"list: there is no kind '{kind}'{nearest(kind, TABLES)}\n  known: {', '.join(TABLES)}")
    console = Console()
    if kind == "attacks":
        attack.list_attacks(console)
        return
    for name, table in TABLES.items():
        if kind in (None, name):
            grid = Table(
                title=name if kind is None else None, title_justify="left", box=None, show_header=False, pad_edge=False
            )
            grid.add_column(no_wrap=True, style="bold")
            grid.add_column()
            for entry, description in table.items():
                grid.add_row(entry, description)
            console.print(grid)
            if kind is None:
                console.print()


@data_app.command("list")
def data_list(data_dir: DataDir = None) -> None:
    """Say of each data set whether it is here, and where."""
    use_data_dir(data_dir)
    from rich.table import Column, Table

    from fedveil.datasets.sources import status

    grid = Table("data set", "file", Column("found", overflow="fold"), box=None, pad_edge=False)
    for file in status():
        grid.add_row(file.dataset, file.file, str(file.found) if file.found else "not here; fetched when first used")
    for name in ("digits", "spam-demo", "synthetic"):
        grid.add_row(name, "", "always here")
    Console().print(grid)


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="a data set")], data_dir: DataDir = None) -> None:
    """Make sure that a data set is here: download it to the cache where it is not, and check it."""
    use_data_dir(data_dir)
    from fedveil.datasets.sources import find

    found = find(name)
    for path in found.values():
        typer.echo(f"ok  {path}")
    if not found:
        typer.echo(f"ok  {name} needs no files")


@data_app.command("check")
def data_check(name: Annotated[str, typer.Argument(help="a data set")], data_dir: DataDir = None) -> None:
    """Compare a data set's files with their published checksums; download nothing."""
    use_data_dir(data_dir)
    from fedveil.datasets.sources import check

    files = check(name)
    for file in files:
        if not file.problem:
            typer.echo(f"ok  {file.found}")
    problems = [file.problem for file in files if file.problem]
    if problems:
        raise DataError("\n".join(problems))
    if not files:
        typer.echo(f"ok  {name} needs no files")


@data_app.command("show")
def data_show(
    preset: PresetOrFile = "digits",
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="of the partition")] = None,
    out: Annotated[Path | None, typer.Option(help="the picture's file; partition-NAME.png without it")] = None,
    data_dir: DataDir = None,
) -> None:
    """Show who holds what: a table, and a picture of the partition."""
    use_data_dir(data_dir)
    experiment = experiment_of(preset, assignments, seed)
    path = out or Path(f"partition-{experiment.name}.png")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SettingsError(f"--out {path}: must end in .png, .pdf or .svg")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SettingsError(f"--out {path}: {path.parent} is not a folder that can be written")
    from fedveil.datasets.federated import load
    from fedveil.simulations.plots import draw_partition
    from fedveil.simulations.shows import partition_table

    federated = load(experiment.data, experiment.seed)
    console = Console()
    console.print(partition_table(experiment, federated))
    draw_partition(experiment, federated, path)
    console.print(f"picture  {path}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def bench(
    job: Annotated[
        str | None,
        typer.Argument(metavar="[JOB]", help="j1 to j4, growth, encryption or deployment; j1 to j4 without it"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each contestant, in turn; medians are quoted")] = 3,
    engine: Annotated[str | None, typer.Option(help="how FedVeil's clients are computed; auto without it")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="FedVeil's processes that train")] = None,
    flower: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="of Flower's environment; .venv-flower without it")
    ] = None,
    pfl: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="of pfl's environment; .venv-pfl without it")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a page like docs/performance.md whose figures are replaced")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object at the end; progress to standard error")
    ] = False,
) -> None:
    """Measure how fast FedVeil is here, beside a bare loop, the machine's arithmetic, Flower's Ray and Apple's pfl."""
    from fedveil.benchmarks.bench import bench as run_bench

    asked = {"engine": engine, "workers": workers}
    run_bench(
        job,
        settings={key: value for key, value in asked.items() if value is not None},
        peers={"flower": flower, "pfl": pfl},
        repeats=repeats,
        as_json=as_json,
        write=write,
        command=["fedveil", *sys.argv[1:]],
    )


for command in (machines.server, machines.client, machines.status, machines.logs, machines.stop):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedveil {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated learning that a person can run, deploy and attack."""


def main() -> None:
    """Run the command line; a mistake ends in one message and its exit code, never in a traceback."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's own package.module:object is looked for, as python -m does
    warnings.showwarning = _show_warning
    warnings.simplefilter("once", OldKey)
    try:
        app()
    except FedveilError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # a full disk, a folder that was taken away
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say a warning of ours plainly, on standard error; leave others to Python."""
    if issubclass(category, OldKey):
        print(f"warning {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _fail(message: str, code: int) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("stopped" if code == 130 else "error", style="bold red", end=" ")
    console.print(message, markup=False)  # a message may hold [brackets]
    sys.exit(code)
