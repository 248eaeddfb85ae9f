"""The engine: which way of computing it picks, and that workers and memory change the time and nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from helpers.experiments import digits
from torch import nn

from fedveil.client.learning.contribution import Contributions, Instructions
from fedveil.client.learning.pipeline import steps_of
from fedveil.client.learning.runtime import client_runtime
from fedveil.client.learning.states import ContextStates
from fedveil.core.errors import DataError, Interrupted, SettingsError, TrainingError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import from_arrays, to_arrays
from fedveil.models.parameters import get, to_numpy
from fedveil.server.federation import prepare, resolve
from fedveil.simulations.engine.choice import choose
from fedveil.simulations.engine.cohort import CohortGrid
from fedveil.simulations.engine.workers import Job, Workers
from fedveil.simulations.run import run

SMALL = {
    "data.clients": 12,
    "data.partition": "quantity",
    "federation.cohort": 11,
    "federation.rounds": 2,
    "training.epochs": 1,
}
TEXT = {"data.clients": 4, "federation.cohort": 3, "federation.rounds": 1, "training.epochs": 1, "model.units": 8}


def small(**settings) -> Experiment:
    return digits(SMALL, **settings)


def tables(folder: Path) -> bytes:
    return (folder / "metrics.csv").read_bytes() + (folder / "clients.csv").read_bytes()


@pytest.mark.parametrize("engine", ["batched", "processes"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"training__optimizer": "adam", "training__learning_rate": 0.01, "model__dropout": 0.2}],
    ids=["plain", "adam and dropout"],
)
def test_the_number_of_workers_changes_no_byte(engine, settings, tmp_path) -> None:
    settings = settings | {"engine": engine, "data__validation_fraction": 0.2, "evaluation__federated": True}
    settings |= {"data__min_examples": 5}
    found = [run(small(**settings, workers=n), out=tmp_path / str(n)) for n in (1, 2, 3)]
    assert len({result.summary["model_sha256"] for result in found}) == 1
    assert len({tables(result.run_dir) for result in found}) == 1


def test_one_by_one_is_the_same_in_any_process_and_all_at_once_agrees_to_rounding(tmp_path) -> None:
    alone, spread, together = (
        run(small(engine=engine), out=tmp_path / engine) for engine in ("sequential", "processes", "batched")
    )
    assert alone.summary["model_sha256"] == spread.summary["model_sha256"]
    assert tables(alone.run_dir) == tables(spread.run_dir)
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(together.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "engine", "why"),
    [
        ({}, "batched", "dense layers"),
        ({"workers": 1}, "batched", "dense layers"),
        ({"model.name": "tests_networks:convolution", "workers": 2}, "processes", "layers of your own"),
        ({"model.name": "tests_networks:convolution", "workers": 1}, "sequential", "layers of your own"),
        ({"model.name": "tests_networks:branching", "workers": 2}, "processes", "cannot be computed for many"),
    ],
    ids=["dense", "dense, one worker", "own", "own, one worker", "no batched form"],
)
def test_auto_picks_and_says_why(settings, engine, why, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tests_networks.py").write_text(NETWORKS)
    found, words = choose(prepare(resolve(small().override(settings))))
    assert found == engine
    assert why in words


def test_on_a_cpu_an_lstm_trains_one_by_one() -> None:
    experiment = Experiment.preset("spam-demo").override(TEXT | {"workers": 2})
    assert choose(prepare(resolve(experiment))) == ("processes", "on a CPU an LSTM trains as fast one by one")


NETWORKS = """
import math
from torch import nn

class Branching(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.output = nn.Linear(math.prod(task.shape), len(task.classes))
    def forward(self, images):
        images = images.flatten(1)
        return self.output(images) if images.sum() > 0 else self.output(-images)

def branching(task, settings):
    return Branching(task)

def convolution(task, settings):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, len(task.classes)))

class Failing(Branching):
    def forward(self, images):
        if self.training and len(images) > 3:
            raise ValueError("no more than three")
        return super().forward(images)

def failing(task, settings):
    return Failing(task)
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "batched", "model__name": "tests_networks:branching"}, "engine = 'batched': Branching cannot be"),
        ({"engine": "sequential", "workers": 2}, "workers = 2: engine = 'sequential' computes in this process alone"),
        ({"workers": 0}, "workers = 0"),
        ({"engine": "fast"}, "engine = 'fast': must be 'auto', 'batched', 'sequential', 'processes' or 'ray'"),
        ({"device": "cudo"}, "device = 'cudo': must be 'auto', 'cpu' or 'cuda'"),
    ],
    ids=["no batched form", "workers of one process", "no workers", "unknown engine", "unknown device"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings, message, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tests_networks.py").write_text(NETWORKS)
    with pytest.raises(SettingsError, match=message):
        run(small(**settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path) -> None:
    with pytest.raises(SettingsError, match="device = 'cuda': PyTorch finds no CUDA device here; use device = 'cpu'"):
        run(small(device="cuda"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_was_picked_is_in_the_record_and_used_again(tmp_path) -> None:
    first = run(small(), out=tmp_path / "run")
    assert first.summary["engine"] == "batched"
    assert Experiment.load(tmp_path / "run/experiment.toml").engine == "batched"
    again = run(small(workers=1), resume=tmp_path / "run")
    assert again.summary["engine"] == "batched"
    assert again.summary["model_sha256"] == first.summary["model_sha256"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_a_client_whose_code_fails_is_named_in_any_process(engine, workers, monkeypatch, tmp_path) -> None:
    if engine == "sequential" and workers > 1:
        pytest.skip("one process has one worker")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tests_networks.py").write_text(NETWORKS)
    settings = small(engine=engine, workers=workers, model__name="tests_networks:failing")
    with pytest.raises(TrainingError, match=r"client \d+ failed: ValueError: no more than three \(.*tests_networks.py"):
        run(settings, out=tmp_path / "run")


@pytest.fixture
def place():
    settings = small(engine="batched").toml()
    found = client_runtime(settings, states=ContextStates(RecordDict()))
    assert found.vectorized is not None
    assert steps_of(found)[1].name == "train"
    return found


def jobs(rate: float = 0.1) -> list[Job]:
    instructions = Instructions(1, rate, None, False, b"", 0, {})
    chunks = {0: [0, 1, 2], 3: [3, 4], 5: [5]}
    return [Job(Contributions(clients, instructions, {}), first, (0, 2)) for first, clients in chunks.items()]


@pytest.mark.parametrize("number", [1, 3])
def test_weights_that_somebody_holds_are_not_overwritten(place, number) -> None:
    """A strategy may remember updates; memory that nobody holds serves again."""
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 6, number, lambda: False)
    try:
        assert {outcome.seconds > 0 for _, outcome in workers.run(like, jobs())} == {True}
        name = next(iter(like))
        kept = workers.results[name][4]
        before = kept.copy()
        workers.make_room(6)
        list(workers.run(like, jobs(rate=0.7)))
        np.testing.assert_array_equal(kept, before)
        assert (workers.results[name][4] != before).any()
        del kept
        memory = workers.results[name]
        workers.make_room(6)
        list(workers.run(like, jobs(rate=0.3)))
        assert workers.results[name] is memory
    finally:
        workers.close()


def test_a_larger_cohort_than_was_foreseen_gets_its_memory(place) -> None:
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 2, 2, lambda: False)
    try:
        workers.make_room(6)
        assert sum(len(job.contributions.clients) for job, _ in workers.run(like, jobs())) == 6
        assert len(next(iter(workers.results.values()))) == 6
    finally:
        workers.close()


class Remembering(FedAvg):
    """Keeps the first client's weights of each round, as SCAFFOLD and its like do."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays = next(iter(replies[0].content.array_records.values()))
        self.first = getattr(self, "first", None) or {key: value.numpy() for key, value in arrays.items()}
        self.copy = getattr(self, "copy", None) or {key: value.copy() for key, value in self.first.items()}
        return super().aggregate_train(server_round, replies)


def remembering(_experiment, shared):
    return Remembering(**shared)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_strategy_that_remembers_weights_keeps_them(workers, monkeypatch, tmp_path) -> None:
    seen = []
    real = Remembering.aggregate_train

    def looked_at(self, server_round, replies):
        answer = real(self, server_round, replies)
        seen.append(all((self.first[key] == self.copy[key]).all() for key in self.first))
        return answer

    monkeypatch.setattr(Remembering, "aggregate_train", looked_at)
    monkeypatch.setitem(sys.modules, "tests_remembering", sys.modules[__name__])
    settings = small(federation__strategy="tests_remembering:remembering", workers=workers, federation__rounds=4)
    run(settings, out=tmp_path / "run")
    assert seen == [True] * 4


def test_a_worker_that_dies_is_an_error_and_no_process_is_left(place) -> None:
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 6, 2, lambda: False)
    processes = list(workers._processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="was killed by signal 9; where memory ran out, use fewer: --workers 1"):
        list(workers.run(like, jobs()))
    workers.close()
    assert not any(process.is_alive() for process in processes)


def test_a_stop_is_heard_while_workers_compute(place) -> None:
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 6, 2, lambda: True)
    try:
        with pytest.raises(Interrupted):
            list(workers.run(like, jobs()))
    finally:
        workers.close()


def test_workers_end_when_the_process_that_runs_the_rounds_is_killed(tmp_path) -> None:
    """SIGKILL leaves no time to end them: they notice that nobody sends jobs any more."""
    words = ["run", "digits", "--workers", "2", "--quiet", "--out", str(tmp_path / "run")]
    more = ["--set", "federation.rounds=100000"]
    process = subprocess.Popen([sys.executable, "-m", "fedveil", *words, *more], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "run/metrics.csv"
        while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        pids = [int(pid) for pid in children.stdout.split() if Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(pids) == 2
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [
        pid
        for pid in pids
        if Path(f"/proc/{pid}/status").exists() and "Z (" not in Path(f"/proc/{pid}/status").read_text()
    ]
    assert left == []


def test_nothing_is_left_frozen_for_the_garbage_collector(place) -> None:
    before = gc.get_freeze_count()
    workers = Workers(place, to_numpy(get(place.network)), 2, 1, lambda: False)
    assert gc.get_freeze_count() > before
    workers.close()
    assert gc.get_freeze_count() == 0


def test_what_python_itself_counts_as_frozen_keeps_nothing_from_being_frozen(place, monkeypatch) -> None:
    """Python 3.12.1 to 3.12.3 begin with 375 objects that nobody froze; what another froze stays so."""
    real, count = gc.get_freeze_count, []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: real() + 375)
    monkeypatch.setattr(gc, "freeze", lambda real=gc.freeze: (count.append(1), real()))
    Workers(place, to_numpy(get(place.network)), 2, 1, lambda: False).close()
    assert len(count) == 1
    assert real() == 0
    gc.freeze()
    try:
        before = real()
        Workers(place, to_numpy(get(place.network)), 2, 1, lambda: False).close()
        assert before - 1000 < real() <= before  # a few may be freed meanwhile
    finally:
        gc.unfreeze()


def test_a_network_of_ones_own_in_batches_is_what_it_is_one_by_one(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tests_networks.py").write_text(NETWORKS)
    settings = {"model__name": "tests_networks:convolution"}
    alone, together = (run(small(engine=e, **settings), out=tmp_path / e) for e in ("sequential", "batched"))
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(together.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert isinstance(together.model, nn.Sequential)


class Personal(FedAvg):
    """Sends every client a model of its own, as personalised strategies do."""

    def configure_train(self, server_round, arrays, config, grid):
        found = []
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own = to_arrays({key: value + np.float32(node * 1e-3) for key, value in from_arrays(arrays).items()})
            content = RecordDict({"arrays": own, "config": message.content["config"]})
            found.append(Message(content, dst_node_id=node, message_type="train"))
        return found


def personal(_experiment, shared):
    return Personal(**shared)


@pytest.mark.parametrize("engine", ["batched", "processes"])
def test_a_model_for_each_client_trains_as_it_does_one_by_one(engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tests_remembering", sys.modules[__name__])
    settings = {"federation__strategy": "tests_remembering:personal"}
    alone = run(small(engine="sequential", **settings), out=tmp_path / "alone")
    begun = []
    real = Workers._begin
    monkeypatch.setattr(Workers, "_begin", lambda self: (begun.append(1), real(self)))
    found = run(small(engine=engine, workers=2, **settings), out=tmp_path / engine)
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert len(begun) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_model_of_another_network_is_refused(place, number) -> None:
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 6, number, lambda: False)
    try:
        for wrong in (
            {name: like[name] for name in list(like)[1:]},
            like | {next(iter(like)): np.zeros((1, 1), np.float32)},
        ):
            with pytest.raises(DataError, match="the strategy sent weights of another network"):
                list(workers.run(wrong, jobs()))
    finally:
        workers.close()


def test_pushed_messages_are_pulled_by_their_ids(place) -> None:
    like = to_numpy(get(place.network))
    workers = Workers(place, like, 4, 1, lambda: False)
    try:
        grid = CohortGrid(place, workers, {"experiment": place.experiment.toml()})
        config = ConfigRecord({"learning-rate": 0.1, "server-round": 1})
        content = RecordDict({"arrays": to_arrays(like), "config": config})
        ids = grid.push_messages([Message(content, dst_node_id=node, message_type="train") for node in (1, 2, 3, 4)])
        replies = list(grid.pull_messages(ids))
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert len(set(ids)) == 4
    finally:
        workers.close()


def test_a_cohort_that_memory_cannot_hold_is_said(place, monkeypatch) -> None:
    real = np.empty

    def limited(size, *others):
        if size > 10**9:
            raise MemoryError
        return real(size, *others)

    monkeypatch.setattr(np, "empty", limited)
    with pytest.raises(SettingsError, match=r"the weights of a cohort of 1,000,000 take 68.9 GB.*federation.cohort"):
        Workers(place, to_numpy(get(place.network)), 1_000_000, 1, lambda: False)


def test_a_worker_that_cannot_start_leaves_none_behind(place, monkeypatch) -> None:
    process = multiprocessing.get_context("fork").Process
    real, started = process.start, []

    def fails_on_the_second(self):
        if started:
            raise OSError("no more processes")
        real(self)
        started.append(self)

    monkeypatch.setattr(process, "start", fails_on_the_second)
    with pytest.raises(OSError, match="no more processes"):
        Workers(place, to_numpy(get(place.network)), 2, 3, lambda: False)
    assert not started[0].is_alive()
    assert gc.get_freeze_count() == 0


def test_computing_on_the_cpu_touches_no_gpu(monkeypatch, tmp_path) -> None:
    """A process that has touched one cannot fork workers that do."""

    def touched(*_, **__):
        raise AssertionError("a GPU was touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("device_count", "manual_seed_all", "get_rng_state", "set_rng_state", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    run(small(engine="processes", workers=2), out=tmp_path / "run")


def wait_for_rounds(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    metrics = folder / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > number + 1) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture
def long_run(tmp_path):
    """A run of the command line that goes on for minutes."""
    words = ["run", "digits", "--quiet", "--out", str(tmp_path / "run"), "--set", "federation.rounds=100000"]
    process = subprocess.Popen([sys.executable, "-m", "fedveil", *words], stderr=subprocess.PIPE, text=True)
    wait_for_rounds(tmp_path / "run", 1)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


def test_a_run_that_still_goes_on_cannot_be_resumed_beside_itself(long_run) -> None:
    process, folder = long_run
    words = [sys.executable, "-m", "fedveil", "resume", str(folder)]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert f"another process (pid {process.pid}) is writing this run; wait for it to end, or stop it" in answer.stderr
    assert process.poll() is None


def test_sigterm_stops_a_run_as_ctrl_c_does(long_run) -> None:
    process, folder = long_run
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"go on with: fedveil resume {folder}" in said
    assert not (folder / ".lock").exists()
