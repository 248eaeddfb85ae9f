"""Rules that compute a layer for K clients at once, forward and backward.

A rule works on stacked weights, with one matrix product for K clients instead of K products. It records no graph, since
the order of layers is known. A gradient is written directly to its target; with plain SGD the target is the weight
itself, so the product includes the step. Layers for text are in `text_layers.py`; `rules.py` chooses the rules.

Shapes: k clients, b examples each in this step (padded), t words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass
class Step:
    """The weights of k clients in a local step, and the targets of their gradients.

    weights: each [k, ...]
    targets: receive the gradients, by the weights' names; the weights themselves where the step is plain SGD
    keep: 1.0 adds a gradient to its target, 0.0 overwrites the target
    drop: `(share, inputs) -> factors` of a dropout layer for its inputs [k, b, ...], from each client's own stream
    """

    weights: dict[str, Tensor]
    targets: dict[str, Tensor]
    keep: float
    drop: Callable[[float, Tensor], Tensor]

    def receive(self, name: str, gradient: Tensor) -> None:
        """Write the gradient of a weight to its target."""
        target = self.targets[name]
        if self.keep:
            target.add_(gradient)
        else:
            target.copy_(gradient)


class Layer(ABC):
    """One layer for k clients; `forward` keeps what `backward` needs until the next `forward`."""

    weighted = True  # has weights to train
    step: Step

    def bind(self, step: Step) -> None:
        """Set the weights and targets of the following calls; called again when the number of clients changes."""
        self.step = step

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs [k, b, ...] of inputs [k, b, ...]."""

    @abstractmethod
    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Write the weights' gradients to their targets, and return the inputs' gradient.

        gradient: of the outputs
        first: no layer before this one has weights, so that the returned value is not used
        """


@dataclass
class Flatten(Layer):
    """`nn.Flatten`, as the first layer alone, since its backward does not restore the shape."""

    weighted = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Flatten: [k, b, ...] -> [k, b, width]."""
        return inputs.flatten(2)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Return the gradient unchanged, which is not used."""
        return gradient


@dataclass
class Linear(Layer):
    """`nn.Linear`."""

    name: str
    biased: bool
    inputs: Tensor = field(init=False)
    ones: Tensor = field(init=False, default_factory=lambda: torch.empty(0))  # [k, 1, b], to sum over examples

    def bind(self, step: Step) -> None:
        """Look up the weights once for many steps."""
        super().bind(step)
        self.weight, self.target = (where[f"{self.name}.weight"] for where in (step.weights, step.targets))
        self.transposed = self.weight.transpose(1, 2)
        if self.biased:
            self.bias, self.bias_target = (
                where[f"{self.name}.bias"].unsqueeze(1) for where in (step.weights, step.targets)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute x W^T + b: [k, b, in] -> [k, b, out], or [k, b, t, in] -> [k, b, t, out]."""
        if inputs.dim() > 3:
            return self.forward(inputs.flatten(1, -2)).view(*inputs.shape[:-1], -1)
        self.inputs = inputs
        if not self.biased:
            return torch.bmm(inputs, self.transposed)
        return torch.baddbmm(self.bias, inputs, self.transposed)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Compute the inputs' gradient before the weights', whose target may be the weight itself."""
        if gradient.dim() > 3:
            return self.backward(gradient.flatten(1, -2), first).view(*gradient.shape[:-1], -1)
        back = gradient if first else torch.bmm(gradient, self.weight)
        keep = self.step.keep
        self.target.baddbmm_(gradient.transpose(1, 2), self.inputs, beta=keep)
        if self.biased:
            k, b, _ = gradient.shape
            if self.ones.shape != (k, 1, b):
                self.ones = gradient.new_ones(k, 1, b)
            self.bias_target.baddbmm_(self.ones, gradient, beta=keep)
        return back


@dataclass
class Elementwise(Layer):
    """An activation without weights.

    apply: inputs -> outputs, which may overwrite the inputs
    slope: (gradient, inputs, outputs) -> the inputs' gradient
    """

    weighted = False

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the activation to each value."""
        self.inputs, self.outputs = inputs, self.apply(inputs)
        return self.outputs

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Return the inputs' gradient by the chain rule."""
        return self.slope(gradient, self.inputs, self.outputs)


@dataclass
class PReLU(Layer):
    """`nn.PReLU` with one slope: x where it is positive, slope * x elsewhere (He et al. 2015, equation 1)."""

    name: str
    inputs: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply negative values by the slope."""
        self.inputs = inputs
        return torch.where(inputs > 0, inputs, inputs * _beside(self.step.weights[f"{self.name}.weight"], inputs))

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Sum the slope's gradient over all negative values, and return the inputs' gradient."""
        slope = _beside(self.step.weights[f"{self.name}.weight"], gradient)  # [k, 1, 1]
        back = torch.where(self.inputs > 0, gradient, gradient * slope)
        below = self.inputs.clamp(max=0).mul_(gradient).flatten(1, -2).sum((1, 2))  # [k]
        self.step.receive(f"{self.name}.weight", below.unsqueeze(1))
        return back


@dataclass
class LayerNorm(Layer):
    """`nn.LayerNorm` over the last dimension (Ba et al. 2016)."""

    name: str
    width: int
    eps: float
    kept: tuple[Tensor, Tensor, Tensor] = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise over the last dimension: [k, ..., width] -> [k, ..., width]."""
        normal, mean, scale = torch.native_layer_norm(inputs, [self.width], None, None, self.eps)
        self.kept = inputs, mean, scale
        self.normal = normal
        gain, shift = (_beside(self.step.weights[f"{self.name}.{part}"], inputs) for part in ("weight", "bias"))
        return torch.addcmul(shift, normal, gain)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Propagate through gain, shift and normalisation."""
        inputs, mean, scale = self.kept
        gain = _beside(self.step.weights[f"{self.name}.weight"], gradient)
        back: Tensor = aten.native_layer_norm_backward(
            gradient * gain, inputs, [self.width], mean, scale, None, None, [True, False, False]
        )[0]
        self.step.receive(f"{self.name}.weight", (gradient * self.normal).flatten(1, -2).sum(1))
        self.step.receive(f"{self.name}.bias", gradient.flatten(1, -2).sum(1))
        return back


@dataclass
class Dropout(Layer):
    """`nn.Dropout`."""

    weighted = False

    share: float
    factors: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Set a share of the values to zero, and scale up the others."""
        self.factors = self.step.drop(self.share, inputs)
        return inputs * self.factors

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Set the gradient of dropped values to zero."""
        return gradient * self.factors


def _beside(weight: Tensor, values: Tensor) -> Tensor:
    """Reshape a weight of the last dimension, [k, width], to broadcast with values [k, ..., width]."""
    return weight.view(len(weight), *[1] * (values.dim() - 2), -1)
