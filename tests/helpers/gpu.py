"""Stand-ins for a GPU on a machine without one: what PyTorch forbids beside it, and a device that computes on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FORBIDDEN = "Unable to handle autograd's threading in combination with fork-based multiprocessing"


def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch act as where it sees a GPU: after a backward pass here, processes forked later can make none."""
    started: list[int] = []  # the process whose backward pass started a GPU's thread, and what it forks inherits this

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def differentiate(*arguments: Any, **named: Any) -> Any:
            if started and started[0] != os.getpid():
                raise RuntimeError(FORBIDDEN)
            started[:] = [os.getpid()]
            return real(*arguments, **named)

        return differentiate

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("backward", "grad"):  # `Tensor.backward` calls the first
        monkeypatch.setattr(torch.autograd, name, watched(getattr(torch.autograd, name)))


def acting_gpu(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 34) -> None:
    """Let `device = "cuda"` work, computed on the CPU; `free`: bytes of memory that it says are free."""

    def on_the_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
        def to(self: Any, *arguments: Any, **named: Any) -> Any:
            return real(self, *["cpu" if str(a).startswith("cuda") else a for a in arguments], **named)

        return to

    for kind in (Tensor, nn.Module):
        monkeypatch.setattr(kind, "to", on_the_cpu(kind.to))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
