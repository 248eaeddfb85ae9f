"""A network's weights as tensors or arrays by name: read, written, and replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.models.computing import memory_for


def get(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the network's weights by name, in the network's order."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def constants(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's buffers that its `state_dict` holds, by name; training changes none of them."""
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {
        name: value.detach()
        for name, value in network.state_dict().items()
        if name not in weights and isinstance(value, Tensor)
    }


def load(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Copy the content of a model's file into the network; raise DataError where it does not fit it.

    stored: the weights, and the network's constants
    """
    parameters = without_constants(network, stored)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(parameters[name])


def without_constants(network: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in a model's file; raise DataError where they, or the constants there, are of another network."""
    own = constants(network)
    parameters = {name: tensor for name, tensor in stored.items() if name not in own}
    check_fit(network, parameters)
    for name, value in own.items():
        if name in stored and not torch.equal(stored[name].nan_to_num(), value.cpu().nan_to_num()):
            raise DataError(
                f"these weights are not of this network: they were trained with another '{name}', which is no weight and is "
                "made from the seed; use the seed and the [model] settings of their run"
            )
    return parameters


def check_fit(network: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise DataError, naming what differs, where `parameters` are not those of `network`."""
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = differing[0]
        raise DataError(
            f"these weights are not of this network: '{name}' is {found.get(name, 'missing')} in the weights and "
            f"{wanted.get(name, 'missing')} in the network ({len(differing)} differ); use the weights of a run with "
            "the same [model] and data settings"
        )


def place(network: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Make the network compute with the tensors in `parameters`, without copying them or checking their shapes."""
    for name, parameter in network.named_parameters():
        parameter.data = parameters[name]
    for module in network.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN needs adjacent weights; does nothing on a CPU


@contextmanager
def kept(network: nn.Module) -> Iterator[None]:
    """Restore the network's weights and each module's mode afterwards, and drop gradients; for use around `place`."""
    weights = [(parameter, parameter.data) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for parameter, tensor in weights:
            parameter.data = tensor
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def to_numpy(parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return `parameters` as arrays; on a CPU they share the tensors' memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in parameters.items()}


def from_numpy(arrays: Mapping[str, np.ndarray], device: torch.device | None = None) -> dict[str, Tensor]:
    """Return `arrays` as tensors on `device`; on a CPU they share memory, but for read-only and strided arrays.

    Raise TrainingError where a GPU lacks memory.
    """
    tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    with memory_for("a model"):
        return {name: tensor.to(device) for name, tensor in tensors.items()}
