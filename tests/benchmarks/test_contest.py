"""Contestants side by side: turns, medians, peers that are missing or fail, and runs that must agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import contest, jobs
from fedveil.core.errors import FedveilError, SettingsError

JOB = jobs.JOBS["j1"]


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def answering(path: Path, values: list[float], **more: object) -> tuple[str, ...]:
    """A contestant whose n-th run has rounds of values[n] seconds; each run leaves a letter in `path`."""
    found = {"first_round_s": 1.0, "memory_mb": 5.0, "model_sha256": "a", "engine": "e", "flops_per_s": 1e9, **more}
    return script(
        f"import json; from pathlib import Path; turn = Path({str(path)!r}); n = turn.stat().st_size if turn.exists() else 0\n"
        f"turn.open('a').write('x'); value = {values}[n]\n"
        f"print('noise'); print(json.dumps({found!r} | {{'round_s': [value, 9.0, value], 'version': '1'}}))"
    )


def test_medians_and_spread_over_runs_are_quoted_of_the_best_variant(tmp_path) -> None:
    listed = [
        contest.Entry("fedveil", "", answering(tmp_path / "own", [0.02, 0.04, 0.03])),
        contest.Entry("bare", "autograd", answering(tmp_path / "a", [0.02, 0.02, 0.02])),
        contest.Entry("bare", "by hand", answering(tmp_path / "b", [0.01, 0.01, 0.05])),
        contest.Entry("pfl", "1 threads", answering(tmp_path / "c", [0.3, 0.3, 0.3])),
    ]
    said: list[str] = []
    row = contest.compare(JOB, listed, 3, said.append)
    assert row["ms_per_client"] == pytest.approx(3.0)
    assert row["ms_per_client_range"] == pytest.approx([2.0, 4.0])
    assert (row["bare_ms_per_client"], row["bare_variant"]) == (pytest.approx(1.0), "by hand")
    assert row["times_bare"] == pytest.approx(3.0)
    assert row["pfl_speedup"] == pytest.approx(10.0)
    assert row["flower_ms_per_client"] is row["flower_speedup"] is None
    assert row["floor_ms_per_client"] == pytest.approx(jobs.flops(JOB) / 1e9 * 1e3)
    order = [line.split("  ")[1].split(":")[0] for line in said]
    assert order == ["fedveil", "bare autograd", "bare by hand", "pfl 1 threads"] * 3  # in turn
    assert json.loads(json.dumps(row)) == row


def test_a_peer_that_fails_is_a_note_and_the_others_go_on(tmp_path) -> None:
    listed = [
        contest.Entry("fedveil", "", answering(tmp_path / "own", [0.02, 0.02])),
        contest.Entry("bare", "autograd", answering(tmp_path / "a", [0.02, 0.02])),
        contest.Entry("flower", "2 workers", script("raise SystemExit('no ray here')"), required=False),
    ]
    row = contest.compare(JOB, listed, 2)
    assert row["flower_ms_per_client"] is None
    assert len(row["notes"]) == 1
    assert "no ray here" in row["notes"][0]


def test_fedveil_itself_may_not_fail() -> None:
    with pytest.raises(FedveilError, match=r"fedveil failed \(exit code 1\):\n  broken"):
        contest.compare(JOB, [contest.Entry("fedveil", "", script("raise SystemExit('broken')"))], 1)


def test_runs_that_give_different_models_are_no_result(tmp_path) -> None:
    first = contest.Entry("fedveil", "", answering(tmp_path / "a", [0.02], model_sha256="a"))
    second = contest.Entry("fedveil", "", answering(tmp_path / "b", [0.02], model_sha256="b"))
    with pytest.raises(FedveilError, match="different models"):
        contest.compare(JOB, [first, second], 1)


def test_a_missing_peer_is_said_in_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, missing = contest.find_peers({"flower": None, "pfl": None})
    assert found == {}
    assert [line.split(":")[0] for line in missing] == ["flower", "pfl"]
    assert all("make peers" in line and "\n" not in line for line in missing)


def test_a_named_peer_must_be_there(tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"--pfl .*nothing: is no Python"):
        contest.find_peers({"pfl": tmp_path / "nothing"})


def test_peers_are_found_and_started_with_their_job(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".venv-pfl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    found, missing = contest.find_peers({})
    assert found == {"pfl": python}  # not resolved: a virtual environment is known by its own link
    assert len(missing) == 1
    entries = [e for e in contest.entries(JOB, jobs.experiment(JOB), found) if e.contestant == "pfl"]
    assert {e.environment["OMP_NUM_THREADS"] for e in entries} >= {"1"}
    for entry in entries:
        assert Path(entry.command[1]).is_file()
        assert json.loads(entry.command[2])["examples"] == 600
