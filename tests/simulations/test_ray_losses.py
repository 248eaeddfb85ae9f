"""A process that Ray loses is no drop-out of its client: the run ends, says which, and goes on to the same bytes."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.ray_runs import on_ray

from fedveil import Experiment
from fedveil.core.errors import TrainingError
from fedveil.core.record.record import Record
from fedveil.server.checkpoint import load_state
from fedveil.server.federation import prepare, resolve
from fedveil.server.rounds.context import Hooks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra fedveil[ray]")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A word in the environment of every process that the test starts."""
    word = f"FEDVEIL_TEST_RAY={uuid.uuid4()}"
    monkeypatch.setenv(*word.split("="))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return word


def actors(mark: str) -> list[int]:
    """The ids of this test's processes that run clients."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and b"ClientAppActor" in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
    return found


def test_a_run_that_loses_a_process_ends_with_its_id_and_goes_on_to_the_same_bytes(tmp_path: Path, mark: str) -> None:
    small = {"engine": "ray", "federation.rounds": 3, "data.clients": 4, "federation.cohort": 4}
    experiment = resolve(Experiment.preset("digits").override(small))
    killed: list[int] = []

    def kill(row: dict[str, object], _state: object) -> None:
        if row["round"] == 1:
            killed.append(actors(mark)[0])
            os.kill(killed[0], signal.SIGKILL)

    federation, record = prepare(experiment), Record.create(experiment, tmp_path / "ray")
    with pytest.raises(
        TrainingError, match=r"round 2: Ray lost the process \d+ on \S+ \(.*no drop-out.*fedveil resume"
    ) as caught:
        on_ray(federation, record, Hooks(kill, federation.evaluate), 2)
    assert killed == [int(number) for number in re.findall(r"the process (\d+)", str(caught.value))]
    assert f"kept: the model and metrics of rounds up to 1, in {record.folder}" in str(caught.value)

    state, _ = load_state(Record(record.folder))  # test_ray.py goes on from such a checkpoint, to the same bytes
    assert state.round == 1
