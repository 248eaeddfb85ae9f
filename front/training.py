"""Commands that train on this machine: `fedveil run`, `resume`, `app`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil import __version__
from fedveil.core.errors import SettingsError
from fedveil.machines import resume_on, submit
from fedveil.options import AsJson, Assignments, DataDir, Quiet, experiment_of, use_data_dir

if TYPE_CHECKING:
    from fedveil.simulations.result import Result

Seed = Annotated[int | None, typer.Option(help="of every random choice; same seed, same bytes")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="processes that compute; changes the time and nothing else")
]


def run(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET | FILE.toml]", help="what to run, digits without it; see `fedveil list presets`"
        ),
    ] = None,
    assignments: Assignments = None,
    seed: Seed = None,
    device: Annotated[str | None, typer.Option(help="cpu (auto is cpu) or cuda")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, batched, sequential, processes or ray")] = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the record; runs/NAME-TIMESTAMP without it")
    ] = None,
    data_dir: DataDir = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved settings as TOML, and run nothing")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    earlier: Annotated[Path | None, typer.Option("--resume", hidden=True)] = None,
    on: Annotated[str | None, typer.Option("--on", hidden=True)] = None,
    app: Annotated[Path | None, typer.Option("--app", hidden=True)] = None,
    clients: Annotated[int | None, typer.Option("--clients", hidden=True)] = None,
) -> None:
    """Train a federated model: a preset, or an experiment of your own.

    Without a name it trains `digits`: real handwritten digits, no download, seconds.
    """
    if app is None and clients is not None:
        raise SettingsError(f"--clients {clients}: only with `fedveil app`; use --set data.clients={clients}")
    given = {
        preset or "": preset, "--set": assignments, "--seed": seed, "--device": device, "--engine": engine,
        "--workers": workers, "--out": out, "--data-dir": data_dir, "--show": show or None, "--resume": earlier, "--on": on,
    }  # fmt: skip
    unfit = {word for word, value in given.items() if value is not None}
    if app is not None:
        _renamed("run --app", f"app {app}", unfit - {"--set", "--seed"})
        flower_app(app, assignments, clients, seed, as_json, quiet)
    elif earlier is not None and on is not None:
        _renamed("run --on --resume", f"resume {earlier} --on {on}", unfit - {"--resume", "--on"})
        resume_on(on, str(earlier), as_json, quiet)
    elif on is not None:
        _renamed("run --on", f"submit {preset or 'digits'} --on {on}", unfit & {"--engine", "--workers", "--out"})
        submit(preset or "digits", on, assignments, seed, device, data_dir, show, as_json, quiet)
    elif earlier is not None:
        _renamed("run --resume", f"resume {earlier}", unfit - {"--resume", "--workers", "--data-dir"})
        resume(earlier, None, None, workers, data_dir, as_json, quiet)
    else:
        use_data_dir(data_dir)
        experiment = experiment_of(preset or "digits", assignments, seed, device=device, engine=engine, workers=workers)
        if show:
            typer.echo(experiment.toml(), nl=False)
            return
        console = _console(as_json, quiet, experiment.name)
        from fedveil.simulations.display import Display
        from fedveil.simulations.run import run as run_experiment

        _tell(run_experiment(experiment, out=out, display=Display(console), command=_command()), console, as_json)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the record's folder; with --on, the run's name")],
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="how many it has now: a finished run goes on to round N")
    ] = None,
    on: Annotated[str | None, typer.Option("--on", metavar="SERVER", help="of a run on a `fedveil server`")] = None,
    workers: Workers = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Resume an interrupted run in its folder, with the same bytes as without interruption; or lengthen a run."""
    if on is not None:
        if rounds is not None or workers is not None or data_dir is not None:
            raise SettingsError(
                "--rounds, --workers, --data-dir: not with --on; the clients of a run on a server agreed to its settings, "
                "and compute each on their own machine"
            )
        resume_on(on, str(folder), as_json, quiet)
        return
    use_data_dir(data_dir)
    from fedveil.core.settings.experiment import resumable

    console = _console(as_json, quiet, resumable(folder).name)
    from fedveil.simulations.display import Display
    from fedveil.simulations.run import resume as go_on

    result = go_on(folder, rounds=rounds, workers=workers, display=Display(console), command=_command())
    _tell(result, console, as_json)


def flower_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a Flower app, with its pyproject.toml")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="of the app's run configuration; repeatable")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(metavar="N", help="how many; else what its Flower configuration says, or 10")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of Python's, NumPy's and PyTorch's generators")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run any Flower app, unmodified and in one process; with --json, what it prints goes to standard error."""
    import logging
    from contextlib import nullcontext, redirect_stdout

    from fedveil.core.settings.experiment import parse_assignments
    from fedveil.simulations.apps import run_app, summary_text

    if quiet:
        logging.getLogger("flwr").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        summary = run_app(folder, parse_assignments(assignments or []), clients=clients, seed=seed)
    if as_json:
        typer.echo(json.dumps(summary))
    elif not quiet:
        typer.echo(summary_text(summary))


def _renamed(old: str, new: str, unfit: set[str]) -> None:
    """Print the new form of a command on standard error; raise SettingsError where options do not go with it."""
    if unfit:
        raise SettingsError(
            f"{', '.join(sorted(unfit))}: not with `fedveil {' '.join(new.split()[:1])}`; see fedveil {new.split()[0]} --help"
        )
    typer.echo(f"note     `fedveil {old}` is now: fedveil {new}", err=True)


def _console(as_json: bool, quiet: bool, name: str) -> Console | None:
    """Return the console for progress, after a first line about what runs; None with --quiet."""
    console = None if quiet else Console(stderr=as_json)
    if console:
        console.print(f"fedveil {__version__}  {name}", highlight=False, markup=False)
    return console


def _tell(result: Result, console: Console | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.summary))
    elif console:
        from fedveil.simulations.display import summary_text

        console.print(summary_text(result), highlight=False, soft_wrap=True, markup=False)


def _command() -> list[str]:
    return ["fedveil", *sys.argv[1:]]
