"""The choice of a rule for each layer of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedveil.models.networks.recurrent import LSTM
from fedveil.models.networks.words import PooledWords, Words
from fedveil.models.vectorized.layers import Dropout, Elementwise, Flatten, Layer, LayerNorm, Linear, PReLU, aten
from fedveil.models.vectorized.text_layers import Pool, PooledTable, Recurrent, WordTable, WordVectors

_ELEMENTWISE: dict[type[nn.Module], Callable[[nn.Module], Elementwise]] = {
    nn.ReLU: lambda _: Elementwise(torch.relu_, lambda d, x, y: aten.threshold_backward(d, y, 0)),
    nn.Sigmoid: lambda _: Elementwise(torch.sigmoid, lambda d, x, y: aten.sigmoid_backward(d, y)),
    nn.Tanh: lambda _: Elementwise(torch.tanh, lambda d, x, y: aten.tanh_backward(d, y)),
    nn.LeakyReLU: lambda m: Elementwise(
        lambda x: nn.functional.leaky_relu(x, m.negative_slope),  # type: ignore[arg-type]
        lambda d, x, y: aten.leaky_relu_backward(d, x, m.negative_slope, False),
    ),
    nn.ELU: lambda m: Elementwise(
        lambda x: nn.functional.elu(x, m.alpha),  # type: ignore[arg-type]
        lambda d, x, y: aten.elu_backward(d, m.alpha, 1.0, 1.0, False, x),
    ),
}


def layers(network: nn.Module) -> list[Layer] | None:
    """Return the rules for a network's layers, in order; None where a layer has no rule."""
    named = list(network.named_parameters(remove_duplicate=False))
    if len(named) > len(list(network.parameters())) or not all(p.requires_grad for _, p in named):
        return None  # two layers share weights, or some weights are not trained
    if any(_is_hooked(module) for module in network.modules()) or any(p._backward_hooks for _, p in named):
        return None
    if type(network) is LSTM:
        return _of_lstm(network)
    if type(network) is not nn.Sequential:
        return None
    if len(list(network.children())) < len(network):
        return None  # a layer is used twice, with the same weights
    found: list[Layer] = []
    for name, module in network.named_children():
        rules = _of_module(name, module, first=not found)
        if rules is None:
            return None
        found += rules
    return found


def _of_module(name: str, module: nn.Module, first: bool) -> Sequence[Layer] | None:
    kind = type(module)
    if kind in _ELEMENTWISE:
        return [_ELEMENTWISE[kind](module)]
    match module:
        case nn.Flatten() if kind is nn.Flatten and first and (module.start_dim, module.end_dim) == (1, -1):
            return [Flatten()]
        case nn.Linear() if kind is nn.Linear:
            return [Linear(name, module.bias is not None)]
        case nn.PReLU() if kind is nn.PReLU and module.num_parameters == 1:
            return [PReLU(name)]
        case nn.LayerNorm() if kind is nn.LayerNorm and len(module.normalized_shape) == 1 and module.bias is not None:
            return [LayerNorm(name, module.normalized_shape[0], module.eps)]
        case nn.Dropout() if kind is nn.Dropout and module.p < 1:
            return [Dropout(module.p)] if module.p > 0 else []
        case PooledWords() if kind is PooledWords and first:
            return [PooledTable(name, module.pooling)]
        case Words() if kind is Words and first:
            return [WordVectors(name)]
    return None


def _of_lstm(network: LSTM) -> list[Layer] | None:
    cells = network.lstm
    if cells.num_layers > 1 and cells.dropout > 0:
        return None  # PyTorch draws the dropout between layers internally, so it cannot be repeated here
    table = WordTable("embedding")
    found: list[Layer] = [table]
    found += [Recurrent("lstm.", f"_l{i}", cells.hidden_size) for i in range(cells.num_layers)]
    found.append(Pool(table, network.pooling))
    if network.dropout.p > 0:
        found.append(Dropout(network.dropout.p))
    return [*found, Linear("output", True)]


def _is_hooked(module: nn.Module) -> bool:
    """Say whether calling the module does more than its `forward`, by hooks or parametrizations."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")
