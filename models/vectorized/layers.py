"""Rules that compute a layer for K clients at once, forward and backward.

A rule works on stacked weights, with one matrix product for K clients instead of K products. It records no graph, since
the order of layers is known. A gradient is written directly to its target; with plain SGD the target is the weight
itself, so the product includes the step. Layers for text are in `text_layers.py`; `rules.py` chooses the rules.

Between `propagate` and `write` a rule can tell the norm of each example's own gradient, without making that gradient
(Goodfellow 2015, "Efficient per-example gradient computations"; for sequences Li et al. 2022, section 4): its inputs
and the slopes, the loss's gradients by its outputs, are enough. `write` then sums the examples' gradients, each times
a factor, in one product (Lee and Kifer 2021).

Shapes: k clients, b examples each in this step (padded), t words.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedveil.models.vectorized.norms import factored, sequence_squares, squared_norms

aten = torch.ops.aten


@dataclass
class Step:
    """The weights of k clients in a local step, and the targets of their gradients.

    weights: each [k, ...]
    targets: receive the gradients, by the weights' names; the weights themselves where the step is plain SGD
    keep: 1.0 adds a gradient to its target, 0.0 overwrites the target
    drop: `(share, inputs) -> factors` of a dropout layer for its inputs [k, b, ...], from each client's own stream
    still: weights that get a gradient but are not trained, so that no norm counts them
    """

    weights: dict[str, Tensor]
    targets: dict[str, Tensor]
    keep: float
    drop: Callable[[float, Tensor], Tensor]
    still: frozenset[str] = frozenset()

    def receive(self, name: str, gradient: Tensor) -> None:
        """Write the gradient of a weight to its target."""
        target = self.targets[name]
        if self.keep:
            target.add_(gradient)
        else:
            target.copy_(gradient)


class Layer(ABC):
    """One layer for k clients; `forward` keeps what `propagate` needs, and both what `write` needs, until the next."""

    step: Step
    each = False  # the norm of each example's gradient is wanted

    def bind(self, step: Step) -> None:
        """Set the weights and targets of the following calls; called again when the number of clients changes."""
        self.step = step

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs [k, b, ...] of inputs [k, b, ...]."""

    @abstractmethod
    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Return the inputs' gradient, and write nothing: a target may be the weight itself.

        gradient: of the outputs
        first: no layer before this one has weights, so that the returned value is not used
        """


class Weighted(Layer):
    """A layer with weights to train."""

    @abstractmethod
    def write(self, factors: Tensor | None = None) -> None:
        """Write the weights' gradients to their targets, the sum over all examples.

        factors: of each example's gradient in the sum, [k, b]; None: all 1
        """

    @abstractmethod
    def squares(self) -> Tensor:
        """Return the squared norm of each example's gradient by the layer's trained weights, [k, b]."""

    def counts(self, name: str) -> bool:
        """Say whether norms count this weight."""
        return name not in self.step.still


@dataclass
class Flatten(Layer):
    """`nn.Flatten`, as the first layer alone, since its backward does not restore the shape."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Flatten: [k, b, ...] -> [k, b, width]."""
        return inputs.flatten(2)

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Return the gradient unchanged, which is not used."""
        return gradient


@dataclass
class Linear(Weighted):
    """`nn.Linear`."""

    name: str
    biased: bool
    inputs: Tensor = field(init=False)  # [k, b * t, in]
    slope: Tensor = field(init=False)  # [k, b * t, out]
    positions: int = field(init=False, default=1)  # t, of each example
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
            outputs = self.forward(inputs.flatten(1, -2)).view(*inputs.shape[:-1], -1)
            self.positions = math.prod(inputs.shape[2:-1])
            return outputs
        self.inputs, self.positions = inputs, 1
        if not self.biased:
            return torch.bmm(inputs, self.transposed)
        return torch.baddbmm(self.bias, inputs, self.transposed)

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Multiply by the weight."""
        if gradient.dim() > 3:
            return self.propagate(gradient.flatten(1, -2), first).view(*gradient.shape[:-1], -1)
        self.slope = gradient
        return gradient if first else torch.bmm(gradient, self.weight)

    def write(self, factors: Tensor | None = None) -> None:
        """Multiply slopes and inputs; the bias's gradient is the sum of slopes."""
        slope = self.slope if factors is None else factored(self.slope, factors)
        keep = self.step.keep
        self.target.baddbmm_(slope.transpose(1, 2), self.inputs, beta=keep)
        if self.biased:
            k, b, _ = slope.shape
            if self.ones.shape != (k, 1, b):
                self.ones = slope.new_ones(k, 1, b)
            self.bias_target.baddbmm_(self.ones, slope, beta=keep)

    def squares(self) -> Tensor:
        """Return |slope|^2 (|inputs|^2 + 1), for one position; for several, those of the sums over them."""
        weight, bias = self.counts(f"{self.name}.weight"), self.biased and self.counts(f"{self.name}.bias")
        if self.positions == 1:
            inside = squared_norms(self.inputs) if weight else torch.zeros_like(self.slope[..., 0])
            return inside.add_(1.0 if bias else 0.0).mul_(squared_norms(self.slope))
        inputs, slope = (part.view(len(part), -1, self.positions, part.shape[-1]) for part in (self.inputs, self.slope))
        found = torch.stack([sequence_squares(x, s) for x, s in zip(inputs, slope, strict=True)]) if weight else 0.0
        return found + (slope.sum(2).square().sum(-1) if bias else torch.zeros_like(slope[:, :, 0, 0]))


@dataclass
class Elementwise(Layer):
    """An activation without weights.

    apply: inputs -> outputs, which may overwrite the inputs
    slope: (gradient, inputs, outputs) -> the inputs' gradient
    """

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the activation to each value."""
        self.inputs, self.outputs = inputs, self.apply(inputs)
        return self.outputs

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Return the inputs' gradient by the chain rule."""
        return self.slope(gradient, self.inputs, self.outputs)


@dataclass
class PReLU(Weighted):
    """`nn.PReLU` with one slope: x where it is positive, slope * x elsewhere (He et al. 2015, equation 1)."""

    name: str
    inputs: Tensor = field(init=False)
    parts: Tensor = field(init=False)  # the slope's gradient, of each value

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply negative values by the slope."""
        self.inputs = inputs
        return torch.where(inputs > 0, inputs, inputs * _beside(self.step.weights[f"{self.name}.weight"], inputs))

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Multiply by 1, or by the slope where the input is negative."""
        slope = _beside(self.step.weights[f"{self.name}.weight"], gradient)  # [k, 1, 1]
        self.parts = self.inputs.clamp(max=0).mul_(gradient)
        return torch.where(self.inputs > 0, gradient, gradient * slope)

    def write(self, factors: Tensor | None = None) -> None:
        """Sum the slope's gradient over all negative values."""
        parts = self.parts if factors is None else factored(self.parts, factors)
        self.step.receive(f"{self.name}.weight", parts.flatten(1, -2).sum((1, 2)).unsqueeze(1))  # [k, 1]

    def squares(self) -> Tensor:
        """Return the square of each example's sum."""
        if not self.counts(f"{self.name}.weight"):
            return torch.zeros_like(self.parts.flatten(2)[..., 0])
        return self.parts.flatten(2).sum(-1).square()


@dataclass
class LayerNorm(Weighted):
    """`nn.LayerNorm` over the last dimension (Ba et al. 2016)."""

    name: str
    width: int
    eps: float
    kept: tuple[Tensor, Tensor, Tensor] = field(init=False)
    gradient: Tensor = field(init=False)  # of the outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise over the last dimension: [k, ..., width] -> [k, ..., width]."""
        normal, mean, scale = torch.native_layer_norm(inputs, [self.width], None, None, self.eps)
        self.kept = inputs, mean, scale
        self.normal = normal
        gain, shift = (_beside(self.step.weights[f"{self.name}.{part}"], inputs) for part in ("weight", "bias"))
        return torch.addcmul(shift, normal, gain)

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Propagate through gain and normalisation."""
        inputs, mean, scale = self.kept
        self.gradient = gradient
        gain = _beside(self.step.weights[f"{self.name}.weight"], gradient)
        back: Tensor = aten.native_layer_norm_backward(
            gradient * gain, inputs, [self.width], mean, scale, None, None, [True, False, False]
        )[0]
        return back

    def write(self, factors: Tensor | None = None) -> None:
        """Sum over examples and positions: the gain's gradient is that of the outputs times the normal values."""
        gradient = self.gradient if factors is None else factored(self.gradient, factors)
        self.step.receive(f"{self.name}.weight", (gradient * self.normal).flatten(1, -2).sum(1))
        self.step.receive(f"{self.name}.bias", gradient.flatten(1, -2).sum(1))

    def squares(self) -> Tensor:
        """Return the squared norm of each example's sum over its positions."""
        k, b, *_ = self.gradient.shape
        found = self.gradient.new_zeros(k, b)
        for part, values in (("weight", self.gradient * self.normal), ("bias", self.gradient)):
            if self.counts(f"{self.name}.{part}"):
                found += values.reshape(k, b, -1, self.width).sum(2).square().sum(-1)
        return found


@dataclass
class Dropout(Layer):
    """`nn.Dropout`."""

    share: float
    factors: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Set a share of the values to zero, and scale up the others."""
        self.factors = self.step.drop(self.share, inputs)
        return inputs * self.factors

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Set the gradient of dropped values to zero."""
        return gradient * self.factors


def _beside(weight: Tensor, values: Tensor) -> Tensor:
    """Reshape a weight of the last dimension, [k, width], to broadcast with values [k, ..., width]."""
    return weight.view(len(weight), *[1] * (values.dim() - 2), -1)
