"""The device and the number of threads that PyTorch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedveil.core.errors import SettingsError


def find_device(name: str) -> torch.device:
    """Return the device of the setting `device`; `auto` is the CPU, which is faster for clients that train one by one.

    Raise SettingsError for `cuda` where PyTorch finds no GPU.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("device = 'cuda': PyTorch finds no CUDA device here; use device = 'cpu'")
        torch.backends.cudnn.allow_tf32 = False  # else LSTMs and convolutions compute with 10 bits, all else with 23
    return torch.device("cpu" if name == "auto" else name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, since the number of threads changes the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
