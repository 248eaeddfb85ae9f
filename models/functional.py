"""Any network for K clients at once, by `torch.func`: for those that have no layer rules, a user's own above all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedveil.models.layers import Step
from fedveil.models.losses import losses_and_slopes


class Functional:
    """A network computed with stacked weights, its gradients by autograd."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        self._fixed = {**frozen, **dict(network.named_buffers())}
        self.unused: set[str] = set()  # weights without a gradient in the last step

    @classmethod
    def of(cls, network: nn.Module, inputs: Tensor) -> Functional | str:
        """The network; why it cannot be computed so, in words, where it cannot.

        inputs: a few examples, to compare with the network itself
        """
        kind = type(network).__name__
        found = cls(network)
        weights = {
            name: p.detach().unsqueeze(0).expand(2, *p.shape).clone()
            for name, p in network.named_parameters()
            if p.requires_grad
        }
        pair = torch.stack([inputs, inputs.flip(0)])
        training = network.training
        network.train()  # in training dropout draws, which vmap refuses: its draws would not be each client's own
        try:
            with torch.no_grad():
                together = found.outputs(weights, pair)
                alone = torch.stack([network(examples) for examples in pair])
                single = torch.cat([network(inputs[i : i + 1]) for i in range(len(inputs))])
        except Exception as error:  # of a user's own code, or of an operation that vmap does not know: any
            return f"{kind} cannot be computed for many clients at once ({str(error).splitlines()[0][:100]})"
        finally:
            network.train(training)
        if not torch.allclose(together, alone, rtol=1e-4, atol=1e-5):
            return f"{kind} gives other values when it is computed for many clients at once"
        if not torch.allclose(alone[0], single, rtol=1e-4, atol=1e-5):
            return f"{kind} mixes the examples of a batch"
        return found

    def outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Logits [k, b, classes] of inputs [k, b, ...]."""

        def one(own: dict[str, Tensor], examples: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._network, {**self._fixed, **own}, (examples,))
            return logits

        return vmap(one)(weights, inputs)

    def anew(self, network: nn.Module) -> Functional:
        """One that holds no tensors of clients yet."""
        return Functional(network)

    def bind(self, step: Step) -> None:
        """Compute with these weights from now on."""
        self._step = step

    def losses(self, inputs: Tensor, labels: Tensor, factors: Tensor, kind: str) -> Tensor:
        """The loss of each example, [k, b]; the gradients of their sum, each times its factor, go to the targets."""
        step = self._step
        with torch.enable_grad():
            weights = {name: w.detach().requires_grad_() for name, w in step.weights.items()}
            outputs = self.outputs(weights, inputs)
        values, slopes = losses_and_slopes(outputs.detach(), labels, kind)
        gradients = torch.autograd.grad(
            outputs, list(weights.values()), slopes * factors.unsqueeze(-1), allow_unused=True
        )
        self.unused = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                step.targets[name].zero_()
            else:
                step.targets[name].copy_(gradient)
        return values
