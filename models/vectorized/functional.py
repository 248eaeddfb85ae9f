"""Networks without layer rules, users' own above all, computed for K clients at once by `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fedveil.models.local.losses import losses_and_slopes
from fedveil.models.vectorized.clipping import shares
from fedveil.models.vectorized.layers import Step

BLOCK = 1 << 24  # numbers in the gradients of the examples that are computed at once, 64 MiB in float32


class Functional:
    """A network computed with stacked weights, and differentiated by autograd."""

    def __init__(self, network: nn.Module, fixed: dict[str, Tensor]) -> None:
        """Take the network; `fixed`: the values of the weights that are not trained."""
        self._network = network
        self._fixed = {**fixed, **dict(network.named_buffers())}
        self._padding = {
            f"{name}.weight" if name else "weight": module.padding_idx
            for name, module in network.named_modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }
        self.unused: set[str] = set()  # weights without a gradient in the last step

    @classmethod
    def of(cls, network: nn.Module, inputs: Tensor) -> Functional | str:
        """Return the network so computed, or the reason, in words, why it cannot be.

        inputs: a few examples, on which outputs and gradients are compared with the network's
        """
        kind = type(network).__name__
        weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        fixed = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        training = network.training
        network.train()  # so that vmap refuses dropout, whose draws would not come from each client's stream
        try:
            found = cls(network, fixed)
            pair = torch.stack([inputs, inputs.flip(0)])
            with torch.enable_grad():
                stacked = {name: w.expand(2, *w.shape).clone().requires_grad_() for name, w in weights.items()}
                together = found.outputs(stacked, pair)
                alone = torch.stack([network(examples) for examples in pair])
                single = torch.cat([network(inputs[i : i + 1]) for i in range(len(inputs))])
                slopes = found.gradients(stacked, together, torch.cos(together.detach()))
                wanted = [_gradients(network, outputs) for outputs in alone]
        except Exception as error:  # a user's code may raise anything, as may operations that vmap does not support
            return f"{kind} cannot be computed for many clients at once: {_reason(error)}"
        finally:
            network.train(training)
        same = [_close(together, alone)]
        same += [_close(slope, torch.stack([w[name] for w in wanted])) for name, slope in slopes.items()]
        if not all(same):
            return f"{kind} gives other values when it is computed for many clients at once"
        if not _close(alone[0], single):
            return f"{kind} mixes the examples of a batch"
        return found

    def outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return logits [k, b, classes] or [k, b, t, vocabulary] of inputs [k, b, ...]."""

        def one(own: dict[str, Tensor], examples: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._network, {**self._fixed, **own}, (examples,))
            return logits

        return vmap(one)(weights, inputs)

    def anew(self, network: nn.Module, fixed: dict[str, Tensor]) -> Functional:
        """Return a new instance without clients' tensors; `fixed`: the values of weights that are not trained."""
        return Functional(network, fixed)

    def gradients(self, weights: dict[str, Tensor], outputs: Tensor, slopes: Tensor) -> dict[str, Tensor]:
        """Return each weight's gradient, [k, ...], from that of the outputs; weights that were not used have none."""
        found = torch.autograd.grad(outputs, list(weights.values()), slopes, allow_unused=True)
        gradients = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        for name, row in self._padding.items():
            if name in gradients:  # vmap omits the gradient of this row for the first client alone
                gradients[name][:, row] = 0.0
        return gradients

    def bind(self, step: Step) -> None:
        """Set the weights and targets of the following calls."""
        self._step = step

    def losses(self, inputs: Tensor, labels: Tensor, factors: Tensor, kind: str) -> Tensor:
        """Return each prediction's loss, [k, b] or [k, b, t], and write the weights' gradients to the step's targets.

        factors: the weight of each prediction in the objective, in the losses' shape
        """
        step = self._step
        with torch.enable_grad():
            weights = {name: w.detach().requires_grad_() for name, w in step.weights.items()}
            outputs = self.outputs(weights, inputs)
        values, slopes = losses_and_slopes(outputs.detach(), labels, kind)
        gradients = self.gradients(weights, outputs, slopes * factors.unsqueeze(-1))
        self.unused = weights.keys() - gradients.keys()
        for name, gradient in gradients.items():
            step.targets[name].copy_(gradient)
        for name in self.unused:
            step.targets[name].zero_()
        return values

    def clipped(
        self, inputs: Tensor, labels: Tensor, factors: Tensor | None, parts: Tensor, kind: str, clip: float
    ) -> tuple[Tensor, Tensor | None]:
        """Write a sum over examples to the targets: each one's gradient shortened to the norm `clip`, times its part.

        As `Chain.clipped`, but each example's gradient is made, for a block of examples at a time.
        """
        step = self._step
        trained = {name: w for name, w in step.weights.items() if name not in step.still}
        factors = torch.ones(labels.shape, dtype=parts.dtype, device=parts.device) if factors is None else factors
        values, good = torch.empty_like(factors), parts > 0
        at_once = max(1, BLOCK // sum(w[0].numel() for w in trained.values()))
        for target in step.targets.values():
            target.zero_()
        for k in range(len(inputs)):  # a vmap of this vmap has the gradients of layer norm's weights in disorder
            own = {name: w[k] for name, w in trained.items()}
            kept = {name: step.weights[name][k] for name in step.still}
            for start in range(0, inputs.shape[1], at_once):
                at = k, slice(start, start + at_once)
                values[at], gradients = self._each(own, kept, inputs[at], labels[at], factors[at], kind)
                squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
                good[at] &= squares.isfinite()
                share = shares(torch.where(good[at], squares, 0.0), parts[at], clip)
                for name, gradient in gradients.items():
                    flat = torch.where(good[at].unsqueeze(1), gradient.flatten(1), 0.0)  # 0 times infinity is no number
                    step.targets[name][k].add_((share @ flat).view(gradient.shape[1:]))
        return values, good

    def _each(
        self,
        own: dict[str, Tensor],
        kept: dict[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        factors: Tensor,
        kind: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of one client's examples, and each example's gradient by the weights `own`, [b, ...].

        kept: weights that are not trained
        """

        def one(features: Tensor, label: Tensor, factor: Tensor) -> Any:
            def logits(own: dict[str, Tensor]) -> Tensor:
                found: Tensor = functional_call(self._network, {**self._fixed, **kept, **own}, (features[None],))
                return found.squeeze(0)

            outputs, pull, *_ = vjp(logits, own)
            values, slopes = losses_and_slopes(outputs, label, kind)
            return values, pull(slopes * factor.unsqueeze(-1))[0]

        values, gradients = vmap(one)(inputs, labels, factors)
        for name, row in self._padding.items():
            if name in gradients:
                gradients[name][:, row] = 0.0
        return values, gradients


def _gradients(network: nn.Module, outputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the network itself, of the same sum of outputs."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(outputs, list(named.values()), torch.cos(outputs.detach()), True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def _reason(error: Exception) -> str:
    """Return the reason in a user's words where PyTorch's message is about its internals."""
    text = str(error)
    if "random" in text:
        return "it draws random numbers; dropout as a layer of a torch.nn.Sequential of known layers can be"
    if ".item()" in text or "data-dependent control flow" in text:
        return "it branches on a value, or calls .item()"
    return (text.splitlines() or [type(error).__name__])[0]


def _close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
