"""The options that commands share: an experiment, changes to it, and the folder of data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedveil.core.errors import SettingsError

PresetOrFile = Annotated[
    str, typer.Argument(metavar="[PRESET | FILE.toml]", help="what to run; see `fedveil list presets`")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a setting, as in training.epochs=5; repeatable"),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="folder that holds mnist/, sms/, enron/ (or set FEDVEIL_DATA)")
]

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object at the end; progress to standard error")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


def experiment_of(name: str, assignments: list[str] | None, seed: int | None = None, **others: Any) -> Any:
    """Return the experiment that a command line describes."""
    from fedveil.core.settings.experiment import Experiment, parse_assignments

    settings = parse_assignments(assignments or [])
    settings |= {key: value for key, value in {"seed": seed, **others}.items() if value is not None}
    experiment = Experiment.find(name)
    if not settings:
        return experiment
    changed = experiment.override(settings)
    data = changed.data
    if (
        "name" in settings
        or name.endswith(".toml")
        or (data.dataset, data.path) == (experiment.data.dataset, experiment.data.path)
    ):
        return changed
    # a preset's name would say of other data that they are the preset's, and perhaps that they are made up
    other = Path(data.path).stem if data.path else data.dataset.name.rpartition(":")[2]
    return changed.override({"name": "".join(c if c.isalnum() or c in "._-" else "-" for c in other)[:80] or "own"})


def use_data_dir(folder: Path | None) -> None:
    """Look for data in this folder first; raise SettingsError where it is no folder."""
    if folder is not None:
        if not folder.is_dir():
            raise SettingsError(f"--data-dir {folder}: is not a folder")
        os.environ["FEDVEIL_DATA"] = str(folder)
