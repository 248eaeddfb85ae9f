"""`python -m benchmarks [JOB]...`: the command line of the benchmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from benchmarks.against import against as run_against
from benchmarks.bench import bench as run_bench
from fedveil.core.errors import FedveilError, SettingsError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[JOB]...",
            help="j1 to j4, growth, encryption, noise, deployment, private, gpu; all but gpu without it",
        ),
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
    against: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="compare j1 to j4 with the FedVeil of this environment, and nothing else"),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a page like docs/performance.md whose figures are replaced")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object at the end; progress to standard error")
    ] = False,
) -> None:
    """Measure how fast FedVeil is here, beside a bare loop, the machine's arithmetic, Flower's Ray and Apple's pfl."""
    settings = {key: value for key, value in (("engine", engine), ("workers", workers)) if value is not None}
    if against is not None:
        if flower or pfl or write:
            raise SettingsError(
                "--against: compares two versions of FedVeil; no --flower, --pfl or --write goes with it"
            )
        run_against(names or [], against, settings=settings, repeats=repeats, as_json=as_json)
        return
    run_bench(
        names or [],
        settings=settings,
        peers={"flower": flower, "pfl": pfl},
        repeats=repeats,
        as_json=as_json,
        write=write,
        command=["python", "-m", "benchmarks", *sys.argv[1:]],
    )


def main() -> None:
    """Run the command line; a mistake ends in one message and its exit code, never in a traceback."""
    try:
        app(prog_name="python -m benchmarks")
    except FedveilError as error:
        typer.echo(f"error {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
