"""Networks that cannot be computed for many examples with a gradient each: one example after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedveil.models.local.losses import losses_and_slopes
from fedveil.models.vectorized.clipping import shares
from fedveil.models.vectorized.layers import Step


class Looped:
    """Any network, with a forward and a backward for each example; dropout draws from PyTorch's global generator."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def anew(self, network: nn.Module, fixed: dict[str, Tensor]) -> Looped:
        """Return a new instance; `fixed`, the untrained weights, are those of the network."""
        return Looped(network)

    def bind(self, step: Step) -> None:
        """Set the weights and targets of the following calls."""
        self._step = step

    def clipped(
        self, inputs: Tensor, labels: Tensor, factors: Tensor | None, parts: Tensor, kind: str, clip: float
    ) -> tuple[Tensor, Tensor | None]:
        """Write a sum over examples to the targets: each one's gradient shortened to the norm `clip`, times its part.

        As `Chain.clipped`, but each example is computed alone.
        """
        step = self._step
        values, good = torch.zeros(labels.shape, dtype=parts.dtype, device=parts.device), parts > 0
        for target in step.targets.values():
            target.zero_()
        for j, i in good.nonzero().tolist():
            own = {name: w[j].detach().requires_grad_(name not in step.still) for name, w in step.weights.items()}
            trained = {name: w for name, w in own.items() if w.requires_grad}
            with torch.enable_grad():
                outputs: Tensor = functional_call(self._network, own, (inputs[j, i : i + 1],)).squeeze(0)
            values[j, i], slopes = losses_and_slopes(outputs.detach(), labels[j, i], kind)
            slopes = slopes if factors is None else slopes * factors[j, i].unsqueeze(-1)
            found = torch.autograd.grad(outputs, list(trained.values()), slopes, allow_unused=True)
            gradients = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
            square = torch.stack([g.square().sum() for g in gradients.values()]).sum()
            good[j, i] = square.isfinite()
            if good[j, i]:
                share = shares(square, parts[j, i], clip)
                for name, gradient in gradients.items():
                    step.targets[name][j] += share * gradient
        return values, good
