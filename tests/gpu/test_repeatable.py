"""Sums in a fixed order on a GPU, for as long as a run takes, and dropout that is drawn where the CPU draws it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.experiments import digits
from helpers.gpu import acting_gpu
from torch import Tensor, nn

from fedveil.core.randomness import Stream, torch_random
from fedveil.models.computing import CUBLAS_WORKSPACE, repeatable
from fedveil.models.local.dropout import HostDropout
from fedveil.models.vectorized.batched import Dropper
from fedveil.simulations.run import run

SMALL = {"data.clients": 4, "federation.cohort": 3, "federation.rounds": 1, "training.epochs": 1}
seen: list[tuple[Any, ...]] = []


def modes() -> tuple[Any, ...]:
    memory: Any = torch.utils.deterministic
    return (
        torch.get_deterministic_debug_mode(), os.environ.get(CUBLAS_WORKSPACE), memory.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )  # fmt: skip


FIXED = (1, ":4096:8", False, False)


class Watched(nn.Module):
    """A network that notes how PyTorch computes while it is trained and evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen.append(modes())
        logits: Tensor = self.output(x.flatten(1))
        return logits


def watched(task: Any, settings: Any) -> nn.Module:
    return Watched()


def test_on_a_gpu_sums_have_a_fixed_order_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    before = modes()
    with repeatable(torch.device("cuda")):
        assert modes() == FIXED
        with pytest.raises(ZeroDivisionError), repeatable(torch.device("cuda")):
            raise ZeroDivisionError
        assert modes() == FIXED
    assert modes() == before
    with repeatable(torch.device("cpu")):
        assert modes() == before


def test_what_a_user_had_set_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True)
    try:
        before = modes()
        with repeatable(torch.device("cuda")):
            assert modes() == FIXED
        assert modes() == before
        assert before[0] == 2
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("engine", ["batched", "sequential"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_on_a_gpu_trains_and_evaluates_in_that_order_and_leaves_the_process_as_it_was(
    device: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tests_repeatable", sys.modules[__name__])
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    if device == "cuda" and not torch.cuda.is_available():
        acting_gpu(monkeypatch)
    before = modes()
    seen.clear()
    experiment = digits(SMALL, device=device, engine=engine, model__name="tests_repeatable:watched", workers=1)
    run(experiment, out=tmp_path / "run", plots=False)
    assert modes() == before
    trying = {before}  # while the network is built and tried, on the CPU
    assert set(seen) - trying == ({FIXED} if device == "cuda" else set())
    if device == "cuda":
        assert seen[-1] == FIXED


@pytest.mark.parametrize("drop", [nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.Dropout1d(0.3), nn.Dropout(0.0)])
def test_dropout_drawn_on_the_cpu_has_the_bits_of_the_cpus_own(drop: nn.Module) -> None:
    def dropped(*, on_host: bool) -> tuple[Tensor, Tensor]:
        inputs = torch.linspace(-1, 1, 60).view(5, 12).requires_grad_()
        with torch_random(Stream(3, 1, 2), "dropout"):
            if on_host:
                with HostDropout():
                    found = drop(inputs * 2)
            else:
                found = drop(inputs * 2)
        return found, torch.autograd.grad(found.square().sum(), inputs)[0]

    for found, wanted in zip(dropped(on_host=True), dropped(on_host=False), strict=True):
        assert torch.equal(found, wanted)


def test_it_is_the_dropout_of_clients_that_train_together() -> None:
    stream = Stream(3, 1, 2)
    dropper = Dropper([stream])
    dropper.sizes = torch.tensor([5]).numpy()
    with torch_random(stream, "dropout"), HostDropout():
        alone = nn.functional.dropout(torch.ones(5, 12), 0.3)
    assert torch.equal(dropper(0.3, torch.ones(1, 5, 12))[0], alone)


def test_without_training_nothing_is_dropped() -> None:
    with HostDropout():
        assert torch.equal(nn.Dropout(0.5).eval()(torch.ones(9)), torch.ones(9))
