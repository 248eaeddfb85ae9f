"""The scripts in examples/ run anywhere, without a network, and show what they say they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def said(name: str, folder: Path) -> list[str]:
    """The lines that an example prints, run in an empty folder with no data and no network."""
    nowhere = "http://127.0.0.1:9"
    environment = {
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "FEDVEIL_CACHE": str(folder / "cache"),
        "FEDVEIL_DATA": "",
    }
    answer = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def number(line: str, before: str) -> float:
    """The number that follows `before` in a line."""
    found = re.search(rf"{before} ([0-9.e+-]+)", line)
    assert found, line
    return float(found[1].rstrip("."))


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"simulate.py", "protect.py", "attack.py"}


def test_clients_with_two_classes_each_learn_worse_than_alike_ones(tmp_path) -> None:
    alike, skewed = said("simulate.py", tmp_path)
    assert number(alike, "accuracy") > 0.9
    assert number(alike, "accuracy") > number(skewed, "accuracy") > 0.5
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_protected_runs_reach_the_plain_model(tmp_path) -> None:
    plain, masked, sealed = said("protect.py", tmp_path)
    assert number(plain, "plain model") == 0
    assert 0 < number(masked, "plain model") < 1e-3
    assert 0 < number(sealed, "plain model") < 1e-3
    for other in (masked, sealed):
        assert number(plain, "accuracy") == pytest.approx(number(other, "accuracy"), abs=0.01)


def test_words_are_read_in_the_clear_and_guessed_under_secure_aggregation(tmp_path) -> None:
    clear, pruned, masked, why = said("attack.py", tmp_path)
    assert number(clear, "recall") == number(pruned, "recall") == 1
    assert number(masked, "recall") == number(masked, "guessing") < 0.5
    assert "saw protected bytes" in why
