"""Stages are timed from outside, each moment once, and without changing what is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import contest, jobs
from benchmarks.stages import NAMES, REST, StageClock
from fedveil import run

TINY = replace(jobs.JOBS["j1"], population=4, cohort=2, batch_size=5, examples=10, rounds=3)


def test_time_counts_once_for_the_innermost_stage(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.stages.time.perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock = StageClock()
    train = clock.timed(lambda: spend(5.0), "train")

    def exchange() -> None:
        spend(1.0)
        train()
        spend(2.0)
        train()

    spend(10.0)
    clock.take()
    spend(0.5)
    clock.timed(exchange, "messages")()
    assert clock.take() == dict.fromkeys(NAMES, 0.0) | {"messages": 3.0, "train": 10.0, REST: 0.5}
    assert set(clock.take().values()) == {0.0}


def test_a_stage_that_fails_ends() -> None:
    clock = StageClock()

    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        clock.timed(fail, "train")()
    clock.take()
    assert {name for name, seconds in clock.take().items() if seconds} <= {REST}


def test_a_run_with_stages_gives_the_same_model_and_divides_all_of_its_rounds(tmp_path) -> None:
    experiment = jobs.experiment(TINY)
    expected = run(experiment, out=tmp_path / "run").summary["model_sha256"]
    found = contest.run_once(contest.fedveil(experiment, "--stages"))
    assert found["model_sha256"] == expected
    assert len(found["round_s"]) == TINY.rounds - 1
    stages = found["stages_s"]
    assert set(stages) == set(NAMES)
    assert all(stages[name] > 0 for name in NAMES)  # each is found where the product has it
    assert sum(stages.values()) == pytest.approx(
        sum(found["round_s"]), rel=0.1, abs=0.05
    )  # two clocks, the same rounds
    assert stages[REST] < sum(stages.values())


def test_memory_counts_worker_processes() -> None:
    """A process that holds 200 MB in a child of its own tells of both."""
    child = "x = bytearray(200_000_000); print(flush=True); input()"
    code = (
        "import json, subprocess, sys\n"
        "from benchmarks.memory import peak_mb\n"
        "alone = peak_mb()\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(json.dumps([alone, peak_mb()]))\n"
        "child.communicate(b'\\n')\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    alone, both = json.loads(answer.stdout)
    assert 200 < both - alone < 260
