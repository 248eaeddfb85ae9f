"""The matrix of attacks and protections: each cell is measured through the real pipeline, beside guessing."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedveil.core.declaration import declares
from fedveil.core.errors import FedveilError, Interrupted, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.published.sources import status
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.display import named
from fedveil.simulations.attacks.lab.lab import Outcome, attack, find_attack
from fedveil.simulations.attacks.lab.observers import OBSERVERS
from fedveil.simulations.attacks.lab.pictures import heat_map
from fedveil.simulations.attacks.lab.trials import Room

RATE = 0.1  # learning rate of the clients' SGD: an update clipped to a norm of 0.1 is a gradient clipped to 1
CLIP = "the row's"
SETTLED = {"training.optimizer": "sgd", "training.learning_rate": RATE, "training.epochs": 1, "training.momentum": 0.0}
QUOTED = {
    "words": "f1", "sentence": "exact", "images": "psnr", "labels": "accuracy", "members": "auc", "update": "cosine"
}  # fmt: skip
BEST = {"psnr": 60.0}  # the score of a full recovery, where it is not 1
CRAFTING = {"server": "malicious-server", "aggregate": "malicious-aggregate"}  # the same, that makes up its model
OFFLINE = {"sms-lstm": "spam-demo", "sms-mlp": "spam-demo", "mnist-mlp": "digits"}
NOISE = {"privacy.noise_multiplier", "privacy.epsilon"}
NEEDS = {"sms-lstm": "sms", "sms-mlp": "sms", "mnist-mlp": "mnist"}


@dataclass(frozen=True)
class Row:
    """An attack on one kind of victim.

    settings: changes to the preset; clip: the clipping norm in columns that clip, about that of a victim's update
    slow: has fewer trials; quick: part of the quick matrix
    """

    name: str
    attack: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    clip: float = RATE
    slow: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Column:
    """A protection, or another way to train, and the observer."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    observer: str = "server"
    quick: bool = False


OVERFIT = {"data.client_examples": 100, "training.epochs": 20, "training.batch_size": 10}
POOLED = {"model.name": "mlp", "model.hidden": [16]}
ROWS = (
    Row("words, mean-pool", "words", "sms-mlp", POOLED, quick=True),
    Row("words, LSTM", "words", "sms-lstm", quick=True),
    Row("word order", "order", "sms-lstm"),
    Row("first layer", "images", "mnist-mlp", quick=True),
    Row("gradient matching", "matching", "mnist-mlp", slow=True),
    Row("labels", "labels", "mnist-mlp", quick=True),
    Row("SPEAR, batch 4", "spear", "mnist-mlp", {"training.batch_size": 4}, slow=True),
    Row("labels, from counts", "counts", "sms-lstm"),
    Row("membership, loss", "loss", "mnist-mlp", OVERFIT, clip=1.0, quick=True),
    Row("membership, cosine", "cosine", "mnist-mlp", OVERFIT, clip=1.0),
    Row("membership, LiRA", "lira", "mnist-mlp", OVERFIT, clip=1.0, slow=True),
    Row("membership, words", "coverage", "sms-lstm", {"data.client_examples": 100, "training.epochs": 5}, clip=1.0),
    Row("imprint, batch 64", "imprint", "mnist-mlp",
        {"model.hidden": [256, 64], "training.batch_size": 64, "federation.cohort": 4}, slow=True),
)  # fmt: skip


def _noise(multiplier: float) -> dict[str, Any]:
    return {"privacy.clip": CLIP, "privacy.noise_multiplier": multiplier, "privacy.noise_at": "client"}


BUDGETS = (8.0, 3.0, 1.0)


def budget(epsilon: float) -> Column:
    """Return the column of clients that protect each of their examples by DP-SGD, with a budget of epsilon."""
    settings = {
        "privacy.unit": "example", "privacy.clip": 1.0, "privacy.epsilon": epsilon, "privacy.noise_at": "client"
    }  # fmt: skip
    return Column(f"example, epsilon {epsilon:g}", settings, quick=epsilon == BUDGETS[1])


COLUMNS = (
    Column("none", quick=True),
    Column("ckks", {"privacy.protection": "ckks"}, quick=True),
    Column("ckks, key holder", {"privacy.protection": "ckks"}, "key-holder", quick=True),
    Column("bfv", {"privacy.protection": "bfv"}),
    Column("secagg", {"privacy.protection": "secagg"}),
    Column("secagg, the sum", {"privacy.protection": "secagg"}, "aggregate", quick=True),
    Column("secagg, two runs", {"privacy.protection": "secagg"}, "two-runs", quick=True),
    Column("secagg, two deployed runs", {"privacy.protection": "secagg"}, "two-deployed-runs"),
    Column("clip alone", {"privacy.clip": CLIP}),
    Column("noise 0.01 C", _noise(0.01)),
    Column("noise 0.1 C", _noise(0.1), quick=True),
    Column("noise 1 C", _noise(1.0)),
    *map(budget, BUDGETS),
    Column("prune 90 %", {"privacy.defence": "prune"}),
    Column("int8", {"communication.encoding": "int8"}),
    Column("batch 8", {"training.batch_size": 8}),
    Column("batch 32", {"training.batch_size": 32}),
    Column("5 epochs", {"training.epochs": 5}),
    Column("Adam", {"training.optimizer": "adam", "training.learning_rate": 0.001}, quick=True),
)


@dataclass(frozen=True)
class Cell:
    """One measurement; `outcome` is None where the row does not go with the column, and `why` says the reason."""

    row: Row
    column: Column
    outcome: Outcome | None
    why: str = ""

    @property
    def metric(self) -> str:
        """The quoted metric."""
        assert self.outcome is not None
        return QUOTED[self.outcome.recovers]

    @property
    def value(self) -> float:
        """The mean score over the trials."""
        assert self.outcome is not None
        return self.outcome.mean()[self.metric]

    @property
    def guessing(self) -> float:
        """The mean score of guessing over the trials."""
        assert self.outcome is not None
        return self.outcome.mean(baseline=True)[self.metric]

    @property
    def share(self) -> float:
        """The share that is recovered: 0 as by guessing, 1 for all; NaN where nothing was measured."""
        if self.outcome is None:
            return float("nan")
        best = BEST.get(self.metric, 1.0)
        return float(np.clip((self.value - self.guessing) / max(best - self.guessing, 1e-9), 0, 1))

    @property
    def words(self) -> str:
        """The text in the cell."""
        if self.outcome is None:
            return "–"
        return (
            "guess"
            if self.outcome.refused
            else f"{self.value:.0f} dB"
            if self.metric == "psnr"
            else f"{self.value:.2f}"
        )


def measure(
    *,
    quick: bool = False,
    more: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[Cell, int, int], None] = lambda _cell, _done, _all: None,
    rows: Sequence[Row] = ROWS,
    columns: Sequence[Column] = COLUMNS,
) -> list[Cell]:
    """Measure all cells of the matrix, row by row.

    more: a user's attacks and defences as package.module:object, each of which adds a row or a column
    Raises SettingsError where one of `more` is neither.
    """
    rows, columns = [row for row in rows if row.quick or not quick], [c for c in columns if c.quick or not quick]
    for name in more:
        own = _own(name)
        if isinstance(own, Row):
            rows.append(own)
        else:
            columns.append(own)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder))
        for row in rows:
            for column in columns:
                cells.append(_cell(row, column, seed, quick, room))
                progress(cells[-1], len(cells), len(rows) * len(columns))
            after = rows[rows.index(row) + 1 :][:1]
            if not after or (after[0].preset, after[0].settings) != (row.preset, row.settings):
                room.forget()  # rows on the same victims are neighbours
    return cells


def _own(name: str) -> Row | Column:
    """Return a user's attack as a row, on a preset for what it recovers, or a user's defence as a column."""
    import importlib

    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"--with {name}: cannot be loaded ({error}); it must be package.module:object") from None
    if (
        declares(found) and len(signature(found).parameters) == 1
    ):  # an attack with settings; a defence takes an update too
        found = find_attack(name)
    if isinstance(found, Attack):
        preset = "mnist-mlp" if found.recovers in ("images", "labels", "members") else "sms-lstm"
        return Row(attribute, name, preset, OVERFIT if found.recovers == "members" else {})
    if callable(found):
        return Column(attribute, {"privacy.defence": name})
    raise SettingsError(f"--with {name}: is a {type(found).__name__}; it must be an Attack, or a function that defends")


def _cell(row: Row, column: Column, seed: int, quick: bool, room: Room) -> Cell:
    chosen = find_attack(row.attack)
    observer = column.observer
    if chosen.craft is not None:
        if observer not in CRAFTING:
            return Cell(row, column, None, "a server that makes up a model compares no runs, and has no key")
        observer = CRAFTING[observer]
    settings = {**SETTLED, **row.settings, **column.settings}
    if settings.get("privacy.clip") == CLIP:
        settings["privacy.clip"] = row.clip
    if NOISE & settings.keys() and NEEDS[row.preset] == "sms":
        settings["data.vocabulary"] = "hashed"  # one of the clients' words would tell of them, whatever the noise
    if "training.batch_size" in column.settings and row.settings.get("training.batch_size", 1) != 1:
        return Cell(row, column, None, "the row has a batch of its own")
    if row.settings is OVERFIT and "training.epochs" in column.settings:
        return Cell(row, column, None, "the row has epochs of its own")
    single = not OBSERVERS[observer].alone
    number = (2 if quick else 5) if row.slow or single else (8 if quick else 20)
    if chosen.recovers == "members":
        number = 2 if quick else 4
    try:
        experiment = Experiment.preset(here(row.preset)).override({"seed": seed, **settings})
        asked = frozenset([*row.settings, *column.settings])
        return Cell(row, column, attack(
            row.attack, experiment, observer=observer, trials=number, asked=asked, room=room
        ))  # fmt: skip
    except Interrupted:
        raise
    except FedveilError as error:
        return Cell(row, column, None, str(error).splitlines()[0])


def here(preset: str) -> str:
    """Return the preset, or one that needs no files where those of its data are not on this machine."""
    files = [file for file in status() if file.dataset == NEEDS[preset]]
    return preset if all(file.found for file in files) else OFFLINE[preset]


def table(cells: Sequence[Cell]) -> Table:
    """Return the matrix as a table for a terminal."""
    rows = list(_lines(cells))
    grid = Table(box=None, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for number in range(1, len(rows) + 1):
        grid.add_column(str(number), justify="right", no_wrap=True)
    for column in dict.fromkeys(cell.column.name for cell in cells):
        line = [next(cell for cell in row if cell.column.name == column) for _, row in rows]
        grid.add_row(column, *(cell.words.removesuffix(" dB") for cell in line))
    return grid


def legend(cells: Sequence[Cell]) -> list[str]:
    """Return what the numbers of the table stand for, a line each."""
    return [f"{number:>2}  {title}" for number, title in enumerate(_titles(cells), start=1)]


def _titles(cells: Sequence[Cell]) -> list[str]:
    """Return each attack with its metric and the score of guessing."""
    titles = []
    for name, line in _lines(cells):
        found = next((cell for cell in line if cell.outcome is not None), None)
        titles.append(name if found is None else f"{name} ({named(found.metric)}; guessing {found.guessing:.2f})")
    return titles


def picture(cells: Sequence[Cell]) -> bytes:
    """Draw the matrix as a heat map, a PNG."""
    lines = list(_lines(cells))
    columns = [cell.column.name for cell in lines[0][1]]
    values = np.array([[cell.share for cell in line] for _, line in lines])
    return heat_map(_titles(cells), columns, values, [[cell.words for cell in line] for _, line in lines])


def as_csv(cells: Sequence[Cell]) -> bytes:
    """Write the cells as CSV, a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["row", "attack", "column", "observer", "metric", "score", "guessing", "trials", "seconds", "refused"]
    )
    for cell in cells:
        start = [cell.row.name, cell.row.attack, cell.column.name, cell.column.observer]
        if cell.outcome is None:
            writer.writerow([*start, "", "", "", 0, "", cell.why])
            continue
        found = cell.outcome
        writer.writerow([
            *start, cell.metric, f"{cell.value:.4f}", f"{cell.guessing:.4f}", len(found.scores), f"{found.seconds:.2f}",
            found.refused or "",
        ])  # fmt: skip
    return text.getvalue().encode()


def _lines(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for name in dict.fromkeys(cell.row.name for cell in cells):
        yield name, [cell for cell in cells if cell.row.name == name]
