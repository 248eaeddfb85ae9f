"""Forked processes beside a GPU: whether they can train, and work that this process must not do itself.

Where PyTorch sees a GPU, the first backward pass of a process starts a thread for it, and PyTorch forbids backward passes
in processes that are forked later ("Unable to handle autograd's threading in combination with fork-based
multiprocessing"). That holds of runs on the CPU too.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

LONGEST = 60.0  # seconds that work in a child may take


def can_fork() -> bool:
    """Say whether this system forks processes safely, as Linux does."""
    return sys.platform == "linux"


def sees_gpu() -> bool:
    """Say whether PyTorch sees a GPU, whether or not a run uses it."""
    return torch.cuda.is_available()


def children_train() -> bool:
    """Say whether processes that are forked now can train; the answer is a child's, which tries."""
    return can_fork() and (not sees_gpu() or in_child(_differentiates) is True)


def in_child(do: Callable[[], Any]) -> Any:
    """Return what `do` returns in a forked process; None where there can be none, or it ends or hangs without an answer."""
    if multiprocessing.current_process().daemon:
        return None  # Python lets it have no processes
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(do, there), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(LONGEST) else None
    except EOFError:
        return None
    finally:
        here.close()
        process.kill()
        process.join()


def _answer(do: Callable[[], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    pipe.send(do())


def _differentiates() -> bool:
    try:
        torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True
