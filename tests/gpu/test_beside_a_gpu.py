"""Runs on the CPU of a machine with a GPU, which PyTorch sees: worker processes train, or this one does, to the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.experiments import digits
from helpers.gpu import FORBIDDEN, beside_a_gpu
from torch import Tensor, nn

from fedveil.core.settings.experiment import Experiment
from fedveil.simulations.display import Display
from fedveil.simulations.engine.forks import children_train, in_child
from fedveil.simulations.run import run

SMALL = {"data.clients": 6, "federation.cohort": 4, "federation.rounds": 2, "training.epochs": 1}


class Doubled(nn.Module):
    """A network without a rule for its layers, on which the engine tries `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(2 * x.flatten(1))
        return logits


def doubled(task: Any, settings: Any) -> nn.Module:
    return Doubled()


class Told(Display):
    """A display that remembers how the clients are computed."""

    def __init__(self) -> None:
        super().__init__(None)
        self.engine = ""

    def live(self, federation: Any, record: Any, engine: str) -> Any:
        self.engine = engine
        return super().live(federation, record, engine)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_beside_a_gpu", sys.modules[__name__])
    if not torch.cuda.is_available():
        beside_a_gpu(monkeypatch)
    elif not children_train():
        pytest.skip("this process has trained beside a GPU, which these tests start with; run this file alone")


def small(**settings: Any) -> Experiment:
    return digits(SMALL, device="cpu", model__name="tests_beside_a_gpu:doubled", **settings)


def in_a_new_process(work: Callable[[], Any]) -> Any:
    """Do work in a process of its own, which has not trained and may have processes of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(work()))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def test_a_network_of_ones_own_trains_in_processes(tmp_path: Path) -> None:
    def work() -> Any:
        told = Told()
        spread = run(small(workers=2), out=tmp_path / "two", display=told, plots=False)
        alone = run(small(workers=1), out=tmp_path / "one", plots=False)
        return told.engine, spread.summary["engine"], spread.summary["model_sha256"] == alone.summary["model_sha256"]

    words, engine, same = in_a_new_process(work)
    assert words.startswith("2 processes: ")
    assert (engine, same) == ("processes", True)


def test_after_training_in_this_process_it_does_all_the_work_says_so_and_makes_the_same_bytes(tmp_path: Path) -> None:
    def work() -> Any:
        told = Told()
        alone = run(small(engine="sequential"), out=tmp_path / "one", plots=False)
        assert not children_train()
        spread = run(small(engine="processes", workers=2), out=tmp_path / "two", display=told, plots=False)
        return told.engine, spread.summary["model_sha256"] == alone.summary["model_sha256"]

    words, same = in_a_new_process(work)
    assert words.startswith("1 process: ")
    assert "this process has trained before, beside a GPU" in words
    assert same


def test_batches_of_a_network_of_ones_own_train_in_processes(tmp_path: Path) -> None:
    def work() -> Any:
        told = Told()
        run(small(engine="batched", workers=2), out=tmp_path / "two", display=told, plots=False)
        return told.engine

    assert in_a_new_process(work).startswith("2 processes: ")


def test_a_process_that_ends_without_an_answer_has_none() -> None:
    assert in_child(os.getpid) != os.getpid()
    assert in_child(lambda: os._exit(3)) is None


def test_the_stand_in_forbids_what_pytorch_forbids() -> None:
    def differentiate() -> str:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError as error:
            return str(error)
        return "made"

    def both() -> tuple[Any, Any, Any]:
        return in_child(differentiate), differentiate(), in_child(differentiate)

    before, here, after = in_a_new_process(both)
    assert (before, here) == ("made", "made")
    assert FORBIDDEN in after
