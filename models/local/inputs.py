"""What a network is fed: examples as tensors on its device."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor, nn

_kept: dict[tuple[int, str], Tensor] = {}  # by the array's id, while the array lives


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are."""
    return next(network.parameters()).device


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Features, labels or a mask as a tensor: word ids and labels int64, all else as it is; float32 shares memory on a CPU."""
    tensor = _tensor(array).to(device)
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()


def kept_on(array: np.ndarray, device: torch.device) -> Tensor:
    """A whole data set's features or labels as they are; where a copy is needed, it is made once and stays while they live."""
    if device.type == "cpu" and array.flags.writeable and array.flags.c_contiguous:
        return _tensor(array)  # the array's own memory
    key = id(array), str(device)
    if key not in _kept:
        _kept[key] = _tensor(array).to(device)
        weakref.finalize(array, _kept.pop, key, None)
    return _kept[key]


def _tensor(array: np.ndarray) -> Tensor:
    # torch warns of read-only memory, as of a mapped file
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
