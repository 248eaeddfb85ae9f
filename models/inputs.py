"""What a network is fed: examples as tensors on its device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are."""
    return next(network.parameters()).device


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Features or labels as a tensor: word ids and labels int64, all else as it is; float32 shares memory on a CPU."""
    writable = np.require(array, requirements=["C", "W"])  # torch warns of read-only memory, as of a mapped file
    tensor = torch.from_numpy(writable).to(device)
    return tensor if tensor.is_floating_point() else tensor.long()
