"""The same experiment on Flower's Simulation Runtime: the same bytes, the same errors, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.ray_runs import on_ray
from safetensors.numpy import load_file

from fedveil import Experiment, run
from fedveil.client.learning import pipeline
from fedveil.core.errors import Interrupted, SettingsError, TrainingError
from fedveil.core.record.record import Record
from fedveil.server.federation import Federation, prepare, resolve
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.engine.ray import check_ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra fedveil[ray]")


@pytest.fixture(autouse=True)
def mark(monkeypatch) -> str:
    """A word in the environment of every process that a test starts."""
    word = f"FEDVEIL_TEST_RAY={uuid.uuid4()}"
    monkeypatch.setenv(*word.split("="))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray keeps sockets there, whose paths must be short
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return word


def ready(folder: Path, **settings) -> tuple[Federation, Record]:
    small = {"federation.rounds": 3, "data.clients": 4, "federation.cohort": 3, "federation.strategy": "fedavgm"}
    held_out = {"data.validation_fraction": 0.2, "evaluation.federated": True}
    experiment = resolve(Experiment.preset("digits").override({"engine": "ray", **small, **held_out, **settings}))
    federation = prepare(experiment)
    return federation, Record.create(experiment, folder)


def living(mark: str) -> list[str]:
    """The commands of processes with the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # a process that has ended meanwhile, or another user's
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def outliving(mark: str) -> list[str]:
    """Those that do not end; Ray tells its processes to end, and they need a moment."""
    deadline = time.monotonic() + 30
    while (found := living(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


@needs_ray
def test_stopped_and_gone_on_with_it_ends_at_the_bytes_of_one_process(tmp_path, mark) -> None:
    python_path = os.environ.get("PYTHONPATH")
    federation, record = ready(tmp_path / "ray")
    rounds, answered, seen = [], [], []
    with pytest.raises(Interrupted):
        on_ray(
            federation, record, Hooks(lambda row, _: rounds.append(row["round"]), federation.evaluate), 2,
            stop=lambda: rounds[-1:] == [1], client_done=lambda done, total: (answered.append((done, total)), seen.extend(living(mark))),
        )  # fmt: skip
    assert rounds == [0, 1]
    assert any("raylet" in command for command in seen)
    assert answered[-3:] == [(1, 3), (2, 3), (3, 3)]
    on_ray(
        federation, record, Hooks(lambda row, _: rounds.append(row["round"]), federation.evaluate), 1
    )  # another number of workers
    assert rounds == [0, 1, 2, 3]

    own = run(federation.experiment.override({"engine": "sequential"}), out=tmp_path / "own")
    assert record.sha256("model.safetensors") == own.summary["model_sha256"]
    for table in ("metrics.csv", "clients.csv"):
        assert record.path(table).read_bytes() == (tmp_path / "own" / table).read_bytes()
    assert outliving(mark) == []
    assert os.environ.get("PYTHONPATH") == python_path
    assert not [thread for thread in threading.enumerate() if thread.name == "flower-runtime"]


@needs_ray
def test_a_clients_exception_ends_the_run_as_in_one_process(tmp_path, mark, monkeypatch) -> None:
    (tmp_path / "broken_net.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if torch.is_grad_enabled():\n"
        "            raise ValueError('this one cannot learn')\n"
        "        return super().forward(x.flatten(1))\n"
        "def make(task, settings):\n"
        "    return Broken(64, 10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    federation, record = ready(tmp_path / "ray", **{"model.name": "broken_net:make"})
    with pytest.raises(
        TrainingError, match=r"round 1: client \d failed: ValueError: this one cannot learn.*broken_net"
    ):
        on_ray(federation, record, Hooks(lambda _row, _state: None, federation.evaluate), 1)
    assert outliving(mark) == []
    sys.modules.pop("broken_net", None)


@needs_ray
def test_a_step_from_outside_acts_in_rays_processes(tmp_path, mark, monkeypatch) -> None:
    """The steps of a client are one list in every process; here a network's module adds one to it."""
    (tmp_path / "steps_net.py").write_text(
        "import torch\n"
        "from fedveil.client.learning import pipeline\n"
        "def zero_biases(runtime, contributions):\n"
        "    contributions.weights['1.bias'][:] = 0\n"
        "pipeline.STEPS.insert(2, pipeline.Step('zero biases', zero_biases))\n"
        "def make(task, settings):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pipeline, "STEPS", list(pipeline.STEPS))
    federation, record = ready(tmp_path / "ray", **{"model.name": "steps_net:make", "federation.rounds": 1})
    on_ray(federation, record, Hooks(lambda _row, _state: None, federation.evaluate), 1)
    made = load_file(record.path("model.safetensors"))
    assert not made["1.bias"].any()
    assert made["1.weight"].any()
    assert outliving(mark) == []
    sys.modules.pop("steps_net", None)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    federation, record = ready(tmp_path / "ray")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(SettingsError, match=r"engine = 'ray': needs Ray.*pip install .*'\.\[ray\]'"):
        on_ray(federation, record, Hooks(lambda _row, _state: None, federation.evaluate), None)


@needs_ray
def test_workers_are_refused_where_a_cluster_is_named(tmp_path, monkeypatch) -> None:
    federation, record = ready(tmp_path / "ray")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(SettingsError, match="workers = 3: has no effect with RAY_ADDRESS set"):
        on_ray(federation, record, Hooks(lambda _row, _state: None, federation.evaluate), 3)


def test_more_workers_than_this_machine_has_processors_are_refused(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SettingsError, match=r"workers = 9999: this machine has \d+ processors"):
        check_ray(9999)
