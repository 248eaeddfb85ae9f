"""A GPU whose memory runs out, made up on the CPU: fewer clients at once, the same result, and bytes that repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.experiments import digits
from helpers.gpu import acting_gpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedveil.core.errors import SettingsError, TrainingError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import computing
from fedveil.models import parameters as weights
from fedveil.models.local import evaluation, training
from fedveil.models.local.room import Room
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build, example
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.simulations.run import resume, run

TASK = Task("features", (6,), ("a", "b", "c"))
SIZES = [7, 1, 4, 12, 3, 9, 2, 6]
GPU = torch.device("cuda")
SMALL = {"data.clients": 12, "federation.cohort": 12, "federation.rounds": 3, "training.epochs": 1, "device": "cuda"}


class Memory(TorchDispatchMode):
    """A memory that refuses some new tensors, whoever asks for them."""

    def __init__(self, refuses: Callable[[int, int], bool]) -> None:
        """`refuses`: a new tensor, by how many there were before it, and its numbers."""
        super().__init__()
        self._refuses, self._tensors, self.refused = refuses, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        flat = tree_leaves((args, kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in flat if isinstance(value, torch.Tensor)}
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self._tensors += 1
                if self._refuses(self._tensors - 1, value.numel()):
                    self.refused += 1
                    raise torch.OutOfMemoryError("made up")
        return found


def little(most: int) -> Memory:
    """A memory in which no tensor of more numbers fits."""
    return Memory(lambda _before, numbers: numbers > most)


def setting() -> tuple[nn.Module, Callable[..., training.Trained]]:
    """A network, and the training of eight clients at once in float64, into memory of its own."""
    rng = np.random.default_rng(1)
    clients = [Examples(rng.random((n, 6)), rng.integers(0, 3, n)) for n in SIZES]
    network = build(TASK, Model(hidden=(50,)), Stream(1)).double()
    start = weights.get(network)
    how = batched(network, example(TASK).double())
    assert isinstance(how, Chain)
    streams = [Stream(7, 3, client) for client in range(len(SIZES))]

    def train(memory: Any = None, **more: Any) -> training.Trained:
        # of NumPy, as an engine's is: no GPU is asked for it
        into = {name: torch.from_numpy(np.empty((len(SIZES), *value.shape))) for name, value in start.items()}
        more = {"together": how, **more}
        with memory or nullcontext():
            return train_clients(
                network,
                start,
                clients,
                Training(batch_size=3, momentum=0.5),
                0.1,
                streams,
                classes=3,
                into=into,
                **more,
            )

    return network, train


def assert_close(found: training.Trained, wanted: training.Trained) -> None:
    for name, tensor in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-9)
    np.testing.assert_array_equal(found.steps, wanted.steps)


@pytest.mark.parametrize("most", [900, 1800])  # numbers; the first layer's weights of one client are 300
def test_where_no_large_tensor_fits_clients_train_in_parts(most: int) -> None:
    _, train = setting()
    room, memory = Room(), little(most)
    found = train(memory, room=room)
    assert_close(found, train(together=None))
    assert memory.refused > 0
    assert room.lacked(3, 3, len(SIZES))  # the third client has most steps, and so is the first


def test_memory_that_runs_out_at_any_allocation_changes_nothing_but_the_parts() -> None:
    network, train = setting()
    wanted, before = train(), weights.get(network)
    counted = Memory(lambda *_: False)
    train(counted)
    tensors = counted._tensors
    assert tensors > 50
    for place in range(0, tensors, 5):
        room = Room()
        found = train(Memory(lambda number, _numbers, place=place: number == place), room=room)
        assert room.lacked(3, 3, len(SIZES)), place
        assert_close(found, wanted)
        assert all(torch.equal(value, before[name]) for name, value in weights.get(network).items())


@pytest.mark.parametrize(("how", "client"), [({}, 3), ({"together": None}, 0)], ids=["together", "one by one"])
def test_a_client_that_does_not_fit_alone_is_named(how: dict[str, Any], client: int) -> None:
    _, train = setting()
    with pytest.raises(
        TrainingError, match=f"client {client}: training it alone needs more memory than the GPU has free"
    ):
        train(little(299 if not how else 20), **how)


def test_a_data_set_that_does_not_fit_says_so_and_no_client_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    held = Examples(rng.random((40, 6)), rng.integers(0, 3, 40))
    network = build(TASK, Model(hidden=(5,)), Stream(1)).double()
    how = batched(network, example(TASK).double())
    assert isinstance(how, Chain)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(training, "kept_on", full)
    clients, streams = [held.select(np.arange(k, 40, 2)) for k in (0, 1)], [Stream(7, 3, k) for k in (0, 1)]
    with pytest.raises(
        TrainingError, match=r"the data set, whose 40 training examples take 0\.0 GB, needs more memory"
    ):
        train_clients(network, weights.get(network), clients, Training(), 0.1, streams, classes=3, together=how)


def test_evaluation_and_a_network_that_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(TASK, Model(hidden=(50,)), Stream(1))
    held = Examples(np.ones((40, 6), np.float32), np.zeros(40, np.int64))
    with little(100), pytest.raises(TrainingError, match="evaluation, with 40 examples at a time, needs more memory"):
        evaluation.evaluate(network, None, held, "cross_entropy")

    def full(*_: Any) -> nn.Module:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(TrainingError, match="the network needs more memory than the GPU has free"):
        computing.put(network, GPU)


def test_other_errors_of_a_client_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    _, train = setting()
    monkeypatch.setattr(training, "train_together", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train()


# --- what is known of the memory, from round to round and from process to process


def test_the_limit_is_a_part_of_the_free_memory_and_stays_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting_gpu(monkeypatch, free=(1 << 30) + 12345)
    assert Room(tmp_path / "checkpoint" / "gpu.json").limits(1, GPU).memory == 1 << 28
    acting_gpu(monkeypatch, free=1 << 40)
    assert Room(tmp_path / "checkpoint" / "gpu.json").limits(9, GPU).memory == 1 << 28
    assert Room().limits(1, GPU).memory == 1 << 38
    (tmp_path / "checkpoint" / "gpu.json").write_text("{}")
    with pytest.raises(SettingsError, match="is damaged"):
        Room(tmp_path / "checkpoint" / "gpu.json")


def test_what_pytorch_holds_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    acting_gpu(monkeypatch, free=1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 200)
    assert computing.free_memory(GPU) == 1300


class Limited:
    """`train_together` of a GPU that holds `most(round)` clients; it notes how many there were at each try."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: Callable[[int], int]) -> None:
        self.tries: dict[int, list[int]] = {}  # by round
        self._most, self._real = most, training.train_together
        monkeypatch.setattr(training, "train_together", self)

    def __call__(self, *arguments: Any) -> Any:
        clients, number = arguments[3], arguments[6][0].round
        self.tries.setdefault(number, []).append(len(clients))
        if len(clients) > self._most(number):
            raise torch.OutOfMemoryError("made up")
        return self._real(*arguments)


def test_a_run_remembers_what_did_not_fit_and_a_resumed_one_repeats_every_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting_gpu(monkeypatch)
    with monkeypatch.context() as patch:
        limited = Limited(patch, lambda number: 4 if number > 1 else 12)
        whole = run(digits(SMALL), out=tmp_path / "whole", plots=False)
    assert limited.tries == {1: [12], 2: [12, 6, 3, 3, 6, 3, 3], 3: [3, 3, 3, 3]}
    found = (whole.run_dir / "checkpoint" / "gpu.json").read_text()
    known = json.loads(found)
    assert known["memory"] == 1 << 32
    assert [(number, n) for number, _, n in known["lacked"]] == [(2, 12), (2, 6), (2, 6)]

    # killed within the second round, and resumed where all clients would fit: they train in the same parts
    killed = run(digits(SMALL, federation__rounds=1), out=tmp_path / "killed", plots=False).run_dir
    (killed / "checkpoint" / "gpu.json").write_text(found)
    with monkeypatch.context() as patch:
        limited = Limited(patch, lambda _number: 12)
        again = resume(killed, rounds=3)
    assert limited.tries == {2: [3, 3, 3, 3], 3: [3, 3, 3, 3]}
    assert again.summary["model_sha256"] == whole.summary["model_sha256"]
