"""Any network for K clients at once, by `torch.func`: for those that have no layer rules, a user's own above all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedveil.models.local.losses import losses_and_slopes
from fedveil.models.vectorized.layers import Step


class Functional:
    """A network computed with stacked weights, its gradients by autograd."""

    def __init__(self, network: nn.Module, fixed: dict[str, Tensor]) -> None:
        """`fixed`: the values of weights that are not trained."""
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
        """The network; why it cannot be computed so, in words, where it cannot.

        inputs: a few examples, to compare with the network itself, in outputs and gradients
        """
        kind = type(network).__name__
        weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        fixed = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        training = network.training
        network.train()  # in training dropout draws, which vmap refuses: its draws would not be each client's own
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
        except Exception as error:  # of a user's own code, or of an operation that vmap does not know: any
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
        """Logits [k, b, classes] or [k, b, t, vocabulary] of inputs [k, b, ...]."""

        def one(own: dict[str, Tensor], examples: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._network, {**self._fixed, **own}, (examples,))
            return logits

        return vmap(one)(weights, inputs)

    def anew(self, network: nn.Module, fixed: dict[str, Tensor]) -> Functional:
        """One that holds no tensors of clients yet; `fixed`: the values of weights that are not trained."""
        return Functional(network, fixed)

    def gradients(self, weights: dict[str, Tensor], outputs: Tensor, slopes: Tensor) -> dict[str, Tensor]:
        """Each weight's gradient, [k, ...], from the outputs'; weights that had no part have none."""
        found = torch.autograd.grad(outputs, list(weights.values()), slopes, allow_unused=True)
        gradients = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        for name, row in self._padding.items():
            if name in gradients:  # vmap leaves out this row for the first client only
                gradients[name][:, row] = 0.0
        return gradients

    def bind(self, step: Step) -> None:
        """Compute with these weights from now on."""
        self._step = step

    def losses(self, inputs: Tensor, labels: Tensor, factors: Tensor, kind: str) -> Tensor:
        """The loss of each prediction, [k, b] or [k, b, t]; the gradient of their sum, weighed by `factors`, goes to the targets."""
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


def _gradients(network: nn.Module, outputs: Tensor) -> dict[str, Tensor]:
    """The plain network's gradients, of the same sum."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(outputs, list(named.values()), torch.cos(outputs.detach()), True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def _reason(error: Exception) -> str:
    """What stood in the way, in a user's words where PyTorch's speak of its own options."""
    text = str(error)
    if "random" in text:
        return "it draws random numbers; dropout as a layer of a torch.nn.Sequential of known layers can be"
    if ".item()" in text or "data-dependent control flow" in text:
        return "it branches on a value, or calls .item()"
    return (text.splitlines() or [type(error).__name__])[0]


def _close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
