"""The matrix: cells that are measured, cells that say why they are not, and a user's own attack and defence in it."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedveil import Interrupted, SettingsError
from fedveil.cli import app
from fedveil.simulations.attacks.lab import budgets, matrix
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.matrix import as_csv, legend, picture, table
from fedveil.simulations.attacks.lab.observation import Known, Observation

PNG = b"\x89PNG\r\n\x1a\n"


def all_ones(observation: Observation, known: Known, _stream: Any) -> np.ndarray:
    """An attack of a user's own: every example is of the first class."""
    counts = np.zeros(len(known.task.classes), np.int64)
    counts[0] = observation.examples or 1
    return counts


OWN_ATTACK = Attack(run=all_ones, recovers="labels", needs=("update",))


def nothing_moves(update: dict[str, np.ndarray], _generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A defence of a user's own that leaves nothing of an update."""
    return {name: np.zeros_like(value) for name, value in update.items()}


ROWS = [row for row in matrix.ROWS if row.name in ("words, mean-pool", "first layer")]
COLUMNS = [column for column in matrix.COLUMNS if column.name in ("none", "ckks", "secagg, the sum")]
measure = partial(matrix.measure, quick=True, rows=ROWS, columns=COLUMNS)


@pytest.fixture(autouse=True)
def no_data(monkeypatch) -> None:
    """The rows need no files."""
    monkeypatch.setenv("FEDVEIL_DATA", "/nowhere")


@pytest.fixture
def own(monkeypatch) -> str:
    """This module under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "own_lab", sys.modules[__name__])
    return "own_lab"


def test_what_is_out_without_protection_is_not_under_it_and_comes_back_in_the_sum() -> None:
    cells = {(cell.row.name, cell.column.name): cell for cell in measure()}
    assert len(cells) == 6
    for row in ("words, mean-pool", "first layer"):
        plain, hidden = cells[row, "none"], cells[row, "ckks"]
        assert plain.share > 0.9
        assert hidden.outcome.refused
        assert hidden.value == hidden.guessing
        assert hidden.words == "guess"
    assert cells["first layer", "secagg, the sum"].share > 0.2
    lines = list(csv.DictReader(io.StringIO(as_csv(list(cells.values())).decode())))
    assert [line["column"] for line in lines[:3]] == ["none", "ckks", "secagg, the sum"]
    assert float(lines[0]["score"]) == pytest.approx(cells["words, mean-pool", "none"].value, abs=1e-4)
    assert lines[1]["refused"]
    assert picture(list(cells.values())).startswith(PNG)
    assert table(list(cells.values())).row_count == 3
    assert len(legend(list(cells.values()))) == 2


def test_an_attack_and_a_defence_of_one_s_own_join_it(own) -> None:
    plain, more = COLUMNS[:1], [f"{own}:OWN_ATTACK", f"{own}:nothing_moves"]
    cells = {(c.row.name, c.column.name): c for c in measure(columns=plain, more=more)}
    assert cells["first layer", "none"].share > 0.9
    assert cells["first layer", "nothing_moves"].share < 0.1
    assert cells["OWN_ATTACK", "none"].metric == "accuracy"


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere:X", "cannot be loaded"), ("own_lab:missing", "cannot be loaded"), ("own_lab:PNG", "is a bytes")],
)
def test_what_is_neither_attack_nor_defence_is_refused(own, name, why) -> None:
    with pytest.raises(SettingsError, match=why):
        measure(more=[name])


def test_settings_that_do_not_go_together_are_a_cell_that_says_why() -> None:
    two = matrix.Column("two", {"privacy.protection": "ckks", "training.epochs": 0}, quick=True)
    cells = measure(columns=[two])
    assert all(cell.outcome is None and cell.why and np.isnan(cell.share) for cell in cells)
    assert len(cells) == 2


def test_a_stop_ends_it_and_is_no_cell(monkeypatch) -> None:
    def stopped(*_words: Any, **_options: Any) -> None:
        raise Interrupted("in round 1; go on with: fedveil resume")

    monkeypatch.setattr("fedveil.simulations.attacks.lab.trials.run", stopped)
    with pytest.raises(Interrupted, match=r"^the attack was stopped; nothing of it is kept$"):
        measure()


def test_the_command_writes_page_picture_and_numbers(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(matrix, "measure", partial(matrix.measure, rows=ROWS, columns=COLUMNS))
    monkeypatch.setattr(budgets, "trained", lambda _epsilon, _seed: 0.5)
    answer = CliRunner().invoke(
        app, ["attack", "matrix", "--quick", "--json", "--quiet", "--out", str(tmp_path / "out")]
    )
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout.splitlines()[-1])
    assert len(told["cells"]) == 6
    assert [(each["epsilon"], each["accuracy"]) for each in told["budgets"]] == [(None, 0.5)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "budgets.csv", "budgets.png", "images.png", "matrix.csv", "matrix.png", "report.html", "scores.json",
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'src="http' not in page
    assert "made up" in page or "digits" in page


@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_without_a_sideways_bar(tmp_path, width) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("NOT TESTED: needs chromium (Debian: apt-get install chromium)")
    out = tmp_path / "out"
    answer = CliRunner().invoke(app, ["attack", "images", "digits", "--trials", "8", "--quiet", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    script = "<script>document.title = document.documentElement.scrollWidth + ' ' + document.images.length</script>"
    page = Path(out / "report.html")
    page.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found, images = shown.partition("<title>")[2].partition("</title>")[0].split()
    assert int(images) == 16
    assert int(found) <= max(width, 500)  # a headless window is at least 500 wide
