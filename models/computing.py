"""What computes: the device, and one thread of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedveil.core.errors import SettingsError


def find_device(name: str) -> torch.device:
    """The device that the setting `device` names; `auto` is the CPU, where clients that train one by one are faster.

    Raise SettingsError for `cuda` where PyTorch finds none.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("device = 'cuda': PyTorch finds no CUDA device here; use device = 'cpu'")
        torch.backends.cudnn.allow_tf32 = False  # else an LSTM or a convolution computes with 10 bits, all else with 23
    return torch.device("cpu" if name == "auto" else name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread: another number of threads would change the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
