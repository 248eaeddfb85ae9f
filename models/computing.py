"""The device and the number of threads that PyTorch computes with, and a GPU's memory and order of sums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.deterministic
from torch import nn

from fedveil.core.errors import SettingsError, TrainingError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACE = ":4096:8"  # with which cuBLAS repeats its results (NVIDIA's cuBLAS documentation, section 2.1.4)


def find_device(name: str) -> torch.device:
    """Return the device of the setting `device`; `auto` is the CPU, which is faster for clients that train one by one.

    Raise SettingsError for `cuda` where PyTorch finds no GPU.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("device = 'cuda': PyTorch finds no CUDA device here; use device = 'cpu'")
        torch.backends.cudnn.allow_tf32 = False  # else LSTMs and convolutions compute with 10 bits, all else with 23
    return torch.device("cpu" if name == "auto" else name)


def put(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device; raise TrainingError where a GPU lacks the memory."""
    with memory_for("the network"):
        return network.to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, since the number of threads changes the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let PyTorch compute the same bytes each time within the block: with one thread, and on a GPU in a fixed order.

    Where an operation of a user's own network has no fixed order on a GPU, PyTorch warns and goes on.
    """
    with one_thread(), _fixed_order() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _fixed_order() -> Iterator[None]:
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filled, tried = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ[CUBLAS_WORKSPACE] = FIXED_WORKSPACE
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` imports PyTorch's compiler, for seconds
    memory.fill_uninitialized_memory = False  # nothing here reads memory before it writes it
    torch.backends.cudnn.benchmark = False  # else cuDNN chooses among algorithms by their time
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tried
        memory.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)
        else:
            os.environ[CUBLAS_WORKSPACE] = workspace


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process can take, those that PyTorch holds unused included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def lacks_memory(error: RuntimeError) -> bool:
    """Say whether an error is a GPU's lack of memory, told by PyTorch, CUDA, cuBLAS or cuDNN."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in told or "CUDA error: out of memory" in told


def too_large(what: str) -> TrainingError:
    """Return the error for what does not fit into a GPU's memory."""
    return TrainingError(f"{what} needs more memory than the GPU has free; free some of it, or use device = 'cpu'")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raise TrainingError that names `what`, in place of a GPU's own error, where it lacks memory in the block."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise too_large(what) from None
