"""`fedveil audit`: what a script reads from it, its exit codes, and one message for each mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedveil.server.rounds.training as rounds
from fedveil.cli import app
from fedveil.core.errors import SettingsError
from fedveil.server.protection.noise import NoisySum

SMALL = ("--canaries", "300", "--set", "federation.rounds=2", "--set", "model.hidden=[8]")


def said(*words: str, code: int = 0) -> str:
    answer = CliRunner().invoke(app, ["audit", *words])
    assert answer.exit_code == code, answer.output
    return answer.stdout


def test_json_has_claim_bounds_estimate_and_verdict_and_the_report_lies_where_it_says(tmp_path: Path) -> None:
    text = said(*SMALL, "--json", "--quiet", "--out", str(tmp_path / "audit"))
    found = json.loads(text)
    assert text.count("\n") == 1
    wanted = {"claim", "bound", "bound_gaussian", "estimate", "delta", "canaries", "verdict", "refuted", "report"}
    assert wanted <= set(found)
    assert found["canaries"] == 300
    assert found["bound"] <= found["claim"]
    assert Path(found["report"]).exists()
    told = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert {name: found[name] for name in told} == told
    assert (tmp_path / "audit" / "run" / "noise.json").exists()


def test_a_person_reads_the_claim_the_bounds_and_what_is_not_shown(tmp_path: Path) -> None:
    text = said(*SMALL, "--out", str(tmp_path / "audit"))
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "claim", "bound", "bound, Gaussian curve", "estimate", "estimate, turns"
    ]  # fmt: skip
    assert "not refuted" in text
    assert "is not proven" in text


def test_a_refuted_claim_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rounds.noisy_sum

    def tenth(*given: Any, **options: Any) -> NoisySum | None:
        found = right(*given, **options)
        return found and replace(found, deviation=found.deviation / 10)

    monkeypatch.setattr(rounds, "noisy_sum", tenth)
    text = said(*SMALL, "--json", "--quiet", "--out", str(tmp_path / "audit"), code=1)
    assert json.loads(text)["refuted"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("digits",), "adds no noise"),
        (("--quick", "--canaries", "500"), "not with --quick"),
        (("--canaries", "5000", "--set", "model.hidden=[8]"), "take fewer"),
    ],
)
def test_a_mistake_is_one_message(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["audit", *words, "--out", str(tmp_path / "audit")])
    assert isinstance(answer.exception, SettingsError)
    assert message in str(answer.exception)


def test_a_folder_that_exists_is_not_written_into(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["audit", *SMALL, "--out", str(tmp_path)])
    assert isinstance(answer.exception, SettingsError)
    assert "exists already" in str(answer.exception)
