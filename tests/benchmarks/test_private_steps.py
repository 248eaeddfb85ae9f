"""The benchmark of DP-SGD measures both kinds of step, and its table says what was reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import private_steps


def test_plain_and_private_steps_take_time(monkeypatch):
    monkeypatch.setattr(private_steps, "TURNS", 1)
    found = private_steps.steps("bag", 8, 2)
    assert found["plain_ms"] > 0
    assert found["ratio"] == pytest.approx(found["private_ms"] / found["plain_ms"])


def answers(entry):
    job = json.loads(entry.command[-1])
    if entry.contestant == "Opacus":
        return {"ms": 12.0, "version": "1.6.0"}
    return {"plain_ms": 2.0, "private_ms": 3.0, "ratio": 1.5 if job["batch"] == 256 else 1.3}


def test_targets_are_judged_where_they_were_measured(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(private_steps, "run_once", answers)
    python = tmp_path / "python"
    alone = private_steps.measure(2, opacus=python)
    assert alone["notes"] == [f"Opacus: not measured, there is no {python} here; see peers/opacus_steps.py"]
    assert [[target["reached"] for target in row["targets"]] for row in alone["rows"]] == [
        [True, None], [True, None], [True, None], [False, None],
    ]  # fmt: skip
    python.touch()
    both = private_steps.measure(2, opacus=python)
    assert both["versions"] == {"opacus (peer)": "1.6.0"}
    assert all(row["opacus_ratio"] == 4.0 and row["targets"][1]["reached"] for row in both["rows"])
    around = {"versions": {}, "date": "2026-01-01", "command": ["x"], "machine": {"processor": "P"}}
    text = private_steps.section(both, around, 2)
    assert "| LSTM 4,000 x 32, 64 units | 256 | 2 | 3 | 1.50 | 1.4 | no | 12 | 4.0 | 3 | yes |" in text
