"""Initial weights of dense layers."""

from __future__ import annotations

import math

from torch import nn


def initialized(network: nn.Module, initialization: str) -> nn.Module:
    """Initialise dense layers, their biases with zero, and return the network; `zeros` sets all weights to zero."""
    if initialization == "zeros":
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            if initialization == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=math.sqrt((2 if initialization == "he" else 1) / layer.in_features))
            nn.init.zeros_(layer.bias)
    return network
