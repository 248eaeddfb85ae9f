"""Budgets of differential privacy: accuracy beside what attacks recover, from cells that were measured and whole runs."""

from __future__ import annotations

import csv
import io
import math

import pytest

from fedveil.core.settings.experiment import Experiment
from fedveil.simulations.attacks.lab import budgets, matrix
from fedveil.simulations.attacks.lab.budgets import Bought, as_csv, picture, table
from fedveil.simulations.attacks.lab.matrix import BUDGETS, COLUMNS, Cell, budget

PNG = b"\x89PNG\r\n\x1a\n"
ROW = next(row for row in matrix.ROWS if row.name == "first layer")
FOUND = [
    Bought(1.0, 0.38, {"first layer": 0.0, "labels": math.nan}),
    Bought(math.inf, 0.94, {"first layer": 1.0, "labels": math.nan}),
]


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs need no files."""
    monkeypatch.setenv("FEDVEIL_DATA", "/nowhere")


@pytest.mark.parametrize("epsilon", BUDGETS)
def test_a_budget_is_a_column_whose_clients_protect_each_example(epsilon: float) -> None:
    column = budget(epsilon)
    assert column in COLUMNS
    privacy = Experiment.preset("digits").override(dict(column.settings)).privacy
    assert privacy.per_example
    assert (privacy.noise_at, privacy.epsilon) == ("client", epsilon)


@pytest.mark.slow
def test_accuracy_falls_with_the_budget_and_an_image_is_out_without_noise_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("none", budget(1.0).name)
    cells = matrix.measure(quick=False, rows=[ROW], columns=[c for c in COLUMNS if c.name in names])
    monkeypatch.setitem(budgets.RUNS, "digits", {**budgets.RUNS["digits"], "model.hidden": [32]})
    strict, free = budgets.measure(cells, 0)
    assert (strict.epsilon, free.epsilon) == (1.0, math.inf)
    assert strict.accuracy < free.accuracy - 0.1
    assert free.accuracy > 0.85
    assert free.shares["first layer"] > 0.9
    assert strict.shares["first layer"] < 0.1


def test_budgets_whose_columns_were_not_measured_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(budgets, "trained", lambda epsilon, _seed: asked.append(epsilon) or 0.5)
    cells = [Cell(ROW, next(c for c in COLUMNS if c.name == name), None) for name in ("none", budget(3.0).name)]
    assert [each.epsilon for each in budgets.measure(cells, 0)] == [3.0, math.inf]
    assert asked == [3.0, math.inf]


def test_a_table_a_file_and_a_picture_hold_every_budget_and_leave_out_what_cannot_be_run() -> None:
    rows = list(csv.reader(io.StringIO(as_csv(FOUND).decode())))
    assert rows == [
        ["epsilon", "accuracy", "first layer", "labels"],
        ["1.0", "0.3800", "0.0000", ""],
        ["inf", "0.9400", "1.0000", ""],
    ]
    assert table(FOUND).row_count == 3
    assert picture(FOUND).startswith(PNG)


def test_under_noise_the_words_of_a_text_are_hashed_and_are_looked_for() -> None:
    """A vocabulary of the clients' own words is refused there."""
    rows = [row for row in matrix.ROWS if row.name == "words, mean-pool"]
    columns = [column for column in COLUMNS if column.name == "noise 0.1 C"]
    (cell,) = matrix.measure(quick=True, rows=rows, columns=columns)
    assert cell.outcome is not None
    assert cell.outcome.experiment.data.vocabulary == "hashed"
