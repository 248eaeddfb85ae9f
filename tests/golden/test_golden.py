"""The same settings and seed give the bytes of the reference, and the script that compares them sees where they do not."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from golden.compare import TABLE, Given, difference, main, other_machine, read, read_table, run_all, write_table
from golden.execute import run_here
from golden.machine import machine
from golden.runs import RUNS, Run
from safetensors.numpy import save

QUICK = [run for run in RUNS.values() if run.quick]
METRICS = "round,train_loss,test_accuracy\n0,,0.1\n1,0.5,0.8\n"
WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


@pytest.fixture(scope="module")
def golden() -> dict[str, Given]:
    """What the reference gave on this machine; the test is skipped, and says so, on another."""
    written, given = read_table(TABLE)
    if other := other_machine(written, machine()):
        pytest.skip(f"NOT COMPARED with the reference: {TABLE.name} was {other}; `make golden` runs the reference here")
    return given


@pytest.mark.parametrize("run", QUICK, ids=lambda run: run.name)
def test_a_run_gives_the_bytes_of_the_reference(
    run: Run, golden: dict[str, Given], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in run.files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_here(run.preset, run.text, dict(run.settings), tmp_path / "run")
    assert difference(golden[run.name], read(tmp_path / "run")) == ""


@pytest.mark.long
def test_every_run_gives_the_bytes_of_the_reference(
    golden: dict[str, Given], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--new", sys.executable])
    assert code == 0, capsys.readouterr().out


def test_the_table_holds_every_run_and_no_other() -> None:
    assert list(read_table(TABLE)[1]) == list(RUNS)


# --- the script


def given(weights: dict[str, np.ndarray] = WEIGHTS, metrics: str = METRICS, metadata: str = "") -> Given:
    """A run that gave these."""
    model = save(weights, {"made": metadata})
    return Given(sha256(model).hexdigest(), metrics, model)


def changed(name: str, place: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    """The weights with another number in one place."""
    weights = {key: array.copy() for key, array in WEIGHTS.items()}
    weights[name][place] = value
    return weights


def test_runs_with_the_same_bytes_do_not_differ() -> None:
    assert difference(given(), given()) == ""


def test_one_bit_of_a_weight_is_a_difference_and_is_found() -> None:
    new = given(changed("a", (1, 2), np.nextafter(np.float32(5), np.float32(6))))
    found = difference(given(), new)
    assert found == "model: a[1, 2] 5.0 became 5.0000005; 1 of 6 of its numbers, by up to 4.8e-07"


def test_the_sign_of_a_zero_is_a_difference() -> None:
    assert "a[0, 0] 0.0 became -0.0" in difference(given(), given(changed("a", (0, 0), -0.0)))


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (given(metadata="later"), "model: the same numbers in other bytes"),
        (given({"a": WEIGHTS["a"]}), "model: tensors ['a', 'b'] became ['a']"),
        (given({**WEIGHTS, "b": np.ones(3, np.float32)}), "model: b float32[2] became float32[3]"),
        (given(metrics=METRICS.replace("0.8", "0.81")), "metrics.csv line 3, test_accuracy: 0.8 became 0.81"),
        (given(metrics=METRICS + "2,0.4,0.9\n"), "metrics.csv line 4: nothing became 2,0.4,0.9"),
        (given(metrics=METRICS.replace("train_loss", "loss")), "metrics.csv line 1: "),
        (given(metrics=METRICS.replace("\n", "\r\n")), "metrics.csv: the same lines with other ends"),
        (Given(error="no such preset"), "new failed: no such preset"),
    ],
    ids=["header", "tensors", "shape", "cell", "row", "columns", "ends", "failure"],
)
def test_the_first_difference_is_named(new: Given, said: str) -> None:
    assert said in difference(given(), new)


def test_without_the_old_model_its_sha256_alone_tells_a_difference() -> None:
    old = given()
    new = given(changed("b", (0,), 2))
    found = difference(Given(old.model_sha256, old.metrics), new)
    assert found == f"model: SHA-256 {old.model_sha256[:12]} became {new.model_sha256[:12]}"


def test_a_changed_byte_is_reported_and_ends_in_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, names = tmp_path / "table.json", ("seed", "partition-iid")
    for name in names:
        run_here(RUNS[name].preset, "", dict(RUNS[name].settings), tmp_path / name)
    write_table(table, machine(), {name: read(tmp_path / name) for name in names})
    written = json.loads(table.read_text())
    cells = written["runs"]["seed"]["metrics"][2].split(",")
    cells[-1] = cells[-1][:-1] + ("1" if cells[-1][-1] != "1" else "2")
    written["runs"]["seed"]["metrics"][2] = ",".join(cells)
    table.write_text(json.dumps(written))
    assert main(["--new", sys.executable, "--table", str(table), "--only", *names]) == 1
    said = capsys.readouterr().out
    assert "seed: metrics.csv line 3, test_accuracy: " in said
    assert "2 runs: 1 give the same bytes, 1 do not" in said


def test_a_table_of_another_machine_is_not_compared_with() -> None:
    here = machine()
    assert other_machine(here, here) == ""
    other = other_machine({**here, "processor": "Other CPU 9000"}, here)
    assert "Other CPU 9000" in other
    assert here["processor"] in other


def test_a_run_whose_data_is_not_here_is_named_and_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="nothing to compare"):
        main(["--new", sys.executable, "--only", "preset-mnist-mlp"])
    assert "NOT RUN: preset-mnist-mlp needs mnist/" in capsys.readouterr().out


def test_a_run_that_fails_differs_and_says_why(tmp_path: Path) -> None:
    wrong = Run("wrong", "a cohort larger than the population", {"federation.cohort": 99})
    found = run_all([wrong], Path(sys.executable), tmp_path, "new")
    assert "federation.cohort = 99: larger than the population" in difference(given(), found["wrong"])
