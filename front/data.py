"""Commands for data sets: `fedveil data list`, `fetch`, `check`, `show`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.core.errors import DataError, SettingsError
from fedveil.options import Assignments, DataDir, PresetOrFile, experiment_of, use_data_dir

MADE = ("digits", "spam-demo", "synthetic")  # without files to look for
app = typer.Typer(help="Data sets: where they are, fetching, checking, and who holds what.", no_args_is_help=True)


@app.command("list")
def data_list(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON array: data set, file, path, here")] = False,
) -> None:
    """List the data sets, whether each is on this machine, and where."""
    use_data_dir(data_dir)
    from fedveil.datasets.published.sources import status

    files = status()
    if as_json:
        rows = [
            {
                "dataset": file.dataset,
                "file": file.file,
                "path": file.found and str(file.found),
                "here": bool(file.found),
            }
            for file in files
        ]
        rows += [{"dataset": name, "file": None, "path": None, "here": True} for name in MADE]
        typer.echo(json.dumps(rows))
        return
    lines = [("data set", "file", "found")]
    lines += [(file.dataset, file.file, str(file.found or "not here; fetched when first used")) for file in files]
    lines += [(name, "", "always here") for name in MADE]
    first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
    for name, file_name, found in lines:  # a path is never wrapped, so that it can be copied
        typer.echo(f"{name:<{first}}  {file_name:<{second}}  {found}")


@app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="a data set")], data_dir: DataDir = None) -> None:
    """Make sure that a data set is here: download it to the cache where it is not, and check it."""
    use_data_dir(data_dir)
    from fedveil.datasets.published.sources import find

    found = find(name)
    for path in found.values():
        typer.echo(f"ok  {path}")
    if not found:
        typer.echo(f"ok  {name} needs no files")


@app.command("check")
def data_check(name: Annotated[str, typer.Argument(help="a data set")], data_dir: DataDir = None) -> None:
    """Compare a data set's files with their published checksums; download nothing."""
    use_data_dir(data_dir)
    from fedveil.datasets.published.sources import check

    files = check(name)
    for file in files:
        if not file.problem:
            typer.echo(f"ok  {file.found}")
    problems = [file.problem for file in files if file.problem]
    if problems:
        raise DataError("\n".join(problems))
    if not files:
        typer.echo(f"ok  {name} needs no files")


@app.command("show")
def data_show(
    preset: PresetOrFile = "digits",
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="of the partition")] = None,
    out: Annotated[Path | None, typer.Option(help="the picture's file; partition-NAME.png without it")] = None,
    data_dir: DataDir = None,
) -> None:
    """Show the partition of the data, as a table and as a picture."""
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
