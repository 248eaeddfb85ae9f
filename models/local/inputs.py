"""A network's inputs: examples as tensors on its device."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import TrainingError

_kept: dict[tuple[int, str], Tensor] = {}  # by the array's id, as long as the array lives


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the network's weights."""
    return next(network.parameters()).device


def compute(network: nn.Module, inputs: Tensor, whose: str) -> Tensor:
    """Return the network's outputs; raise TrainingError for a single example where it normalises by the batch alone.

    whose: of whom the batch is, for the message
    """
    try:
        outputs: Tensor = network(inputs)
    except ValueError as error:
        if len(inputs) > 1:
            raise
        raise TrainingError(
            f"{whose}: a batch of one example, which the network cannot compute ({error}); choose another training.batch_size, "
            "so that no example is left over, or a network with torch.nn.GroupNorm in the place of batch norm"
        ) from error
    return outputs


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Return features, labels or a mask as a tensor: integers as int64, others as they are, sharing memory on a CPU."""
    tensor = _tensor(array).to(device)
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()


def kept_on(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a data set's array as a tensor of its dtype; where a copy is needed, it lives as long as the array."""
    if device.type == "cpu" and array.flags.writeable and array.flags.c_contiguous:
        return _tensor(array)  # shares the array's memory
    key = id(array), str(device)
    if key not in _kept:
        _kept[key] = _tensor(array).to(device)
        weakref.finalize(array, _kept.pop, key, None)
    return _kept[key]


def _tensor(array: np.ndarray) -> Tensor:
    # PyTorch warns about read-only arrays, as those of a mapped file
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
