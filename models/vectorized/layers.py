"""How K clients compute each kind of layer at once: forward, and backward by hand.

A rule works on stacked weights: one matrix product for K clients in place of K products, and no graph to record, as the
order of layers is known. A gradient goes straight into its target; with plain SGD the target is the weight itself, and the
step is part of the product. Layers of text are in `text_layers.py`; which rule a layer has, `rules.py` says.

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
    """What the layers read and write in a local step of k clients.

    weights: each [k, ...]
    targets: where the gradient of each weight goes; the weights themselves where the step is plain SGD
    keep: the factor of what the target holds already: 1.0 adds to it, 0.0 overwrites it
    drop: `(share, inputs) -> factors` of a dropout layer for its inputs [k, b, ...], each client's from its own stream
    """

    weights: dict[str, Tensor]
    targets: dict[str, Tensor]
    keep: float
    drop: Callable[[float, Tensor], Tensor]

    def receive(self, name: str, gradient: Tensor) -> None:
        """Take the gradient of a small weight."""
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
        """Compute with these weights from now on; called again where other clients go on."""
        self.step = step

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs [k, b, ...] of inputs [k, b, ...]."""

    @abstractmethod
    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Hand over the weights' gradients; return the inputs' (of the `first` with weights: anything, nobody reads it)."""


@dataclass
class Flatten(Layer):
    """`nn.Flatten`, only ever the first: there is no way back."""

    weighted = False

    def forward(self, inputs: Tensor) -> Tensor:
        """[k, b, ...] -> [k, b, width]."""
        return inputs.flatten(2)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Nothing to do."""
        return gradient


@dataclass
class Linear(Layer):
    """`nn.Linear`."""

    name: str
    biased: bool
    inputs: Tensor = field(init=False)
    ones: Tensor = field(init=False, default_factory=lambda: torch.empty(0))  # [k, 1, b], to sum over examples with

    def bind(self, step: Step) -> None:
        """Look the weights up once for many steps."""
        super().bind(step)
        self.weight, self.target = (where[f"{self.name}.weight"] for where in (step.weights, step.targets))
        self.transposed = self.weight.transpose(1, 2)
        if self.biased:
            self.bias, self.bias_target = (
                where[f"{self.name}.bias"].unsqueeze(1) for where in (step.weights, step.targets)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """[k, b, in] -> [k, b, out]; of positions [k, b, t, in] -> [k, b, t, out]."""
        if inputs.dim() > 3:
            return self.forward(inputs.flatten(1, -2)).view(*inputs.shape[:-1], -1)
        self.inputs = inputs
        if not self.biased:
            return torch.bmm(inputs, self.transposed)
        return torch.baddbmm(self.bias, inputs, self.transposed)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """The inputs' gradient comes first: the target may be the weight itself."""
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

    apply: inputs -> outputs, which may lie where the inputs were; slope: (gradient, inputs, outputs) -> the inputs' gradient
    """

    weighted = False

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The same shape."""
        self.inputs, self.outputs = inputs, self.apply(inputs)
        return self.outputs

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """The chain rule."""
        return self.slope(gradient, self.inputs, self.outputs)


@dataclass
class PReLU(Layer):
    """`nn.PReLU` with one slope: x where it is positive, slope * x elsewhere (He et al. 2015, equation 1)."""

    name: str
    inputs: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The same shape."""
        self.inputs = inputs
        return torch.where(inputs > 0, inputs, inputs * _beside(self.step.weights[f"{self.name}.weight"], inputs))

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """The slope's gradient sums over all values below zero."""
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
        """[k, ..., width] -> [k, ..., width]."""
        normal, mean, scale = torch.native_layer_norm(inputs, [self.width], None, None, self.eps)
        self.kept = inputs, mean, scale
        self.normal = normal
        gain, shift = (_beside(self.step.weights[f"{self.name}.{part}"], inputs) for part in ("weight", "bias"))
        return torch.addcmul(shift, normal, gain)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Through gain, shift and normalization."""
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
        """Set a share of the values to zero, and make up for it."""
        self.factors = self.step.drop(self.share, inputs)
        return inputs * self.factors

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """What was dropped has no gradient."""
        return gradient * self.factors


def _beside(weight: Tensor, values: Tensor) -> Tensor:
    """A weight of the last dimension, [k, width], shaped to meet values [k, ..., width]."""
    return weight.view(len(weight), *[1] * (values.dim() - 2), -1)
