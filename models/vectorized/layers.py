"""How K clients compute each kind of layer at once: forward, and backward by hand.

Every layer of the networks in `networks.py` has a rule here that works on stacked weights: one matrix product
for K clients in place of K products, and no graph to record, as the order of layers is known. A gradient goes
straight into its target; with plain SGD the target is the weight itself, and the step is part of the product.

Shapes: k clients, b examples each in this step (padded), t words. Texts that become one vector are computed with time
before examples, [k, t, b, ...], so that what one time step reads lies together; where each position has an output of its
own, they are [k, b, t, ...].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedveil.models.networks.recurrent import LSTM
from fedveil.models.networks.words import PADDING, PooledWords, Words

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


@dataclass
class WordTable(Layer):
    """`Words` before a layer that makes one vector of them: int64 [k, b, t] -> [k, t, b, size]; padding's row keeps its values."""

    name: str
    ids: Tensor = field(init=False)  # [k * t * b], rows of all clients' tables laid end to end
    real: Tensor = field(init=False)  # bool [k, t, b]

    def forward(self, inputs: Tensor) -> Tensor:
        """Look the words up, of the columns that are not padding in every text."""
        real = inputs != PADDING
        longest = max(int(real.sum(2).max()), 1)
        self.real = real[:, :, :longest].transpose(1, 2)
        return self.look_up(inputs[:, :, :longest].transpose(1, 2))

    def look_up(self, ids: Tensor) -> Tensor:
        """The vectors of words, int64 [k, ...] -> [k, ..., size]."""
        table = self.step.weights[f"{self.name}.weight"]  # [k, words, size]
        k, rows, size = table.shape
        start = torch.arange(k, device=ids.device).mul_(rows)[:, None, None]
        ids = (ids + start).contiguous()
        self.ids = ids.view(-1)
        return table.reshape(-1, size).index_select(0, self.ids).view(*ids.shape, size)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Only rows of words that occur change."""
        target = self.step.targets[f"{self.name}.weight"]
        padding = target[:, PADDING].clone() if self.step.keep else 0.0
        if not self.step.keep:
            target.zero_()
        size = target.shape[-1]
        target.view(-1, size).index_add_(0, self.ids, gradient.reshape(-1, size))
        target[:, PADDING] = padding
        return gradient


@dataclass
class WordVectors(WordTable):
    """`Words` with an output for each position: int64 [k, b, t] -> [k, b, t, size]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Look the words up, padding too."""
        return self.look_up(inputs)


@dataclass
class Pool(Layer):
    """The `pool` of `words.py`, [k, t, b, size] -> [k, b, size]: a sum over words, each with its own factor."""

    weighted = False

    table: WordTable
    pooling: str
    factors: Tensor = field(init=False)  # [k, t, b, 1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Sum, mean, or the last word's."""
        real = self.table.real.to(inputs.dtype)
        if self.pooling == "mean":
            real = real / real.sum(1, keepdim=True).clamp_(min=1)
        elif self.pooling == "last":  # a word that none follows
            real = real - nn.functional.pad(real[:, 1:], (0, 0, 0, 1))
        self.factors = real.unsqueeze(-1)
        return (inputs * self.factors).sum(1)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """[k, b, size] -> [k, t, b, size]."""
        return gradient.unsqueeze(1) * self.factors


@dataclass
class Recurrent(Layer):
    """One layer of `nn.LSTM`, [k, t, b, in] -> [k, t, b, units] (Hochreiter and Schmidhuber 1997; gates i, f, g, o)."""

    prefix: str  # "lstm."
    suffix: str  # "_l0"
    units: int
    inputs: Tensor = field(init=False)
    gates: Tensor = field(init=False)  # [k, t, b, 4 units]
    cells: Tensor = field(init=False)
    squashed: Tensor = field(init=False)  # tanh of the cells
    states: Tensor = field(init=False)

    def _weight(self, kind: str) -> Tensor:
        return self.step.weights[f"{self.prefix}{kind}{self.suffix}"]

    def forward(self, inputs: Tensor) -> Tensor:
        """The input's part of all time steps in one product, then one time step after another."""
        k, t, b, _ = inputs.shape
        u = self.units
        self.inputs = inputs.view(k, t * b, -1)
        bias = (self._weight("bias_ih") + self._weight("bias_hh")).unsqueeze(1)
        gates = torch.baddbmm(bias, self.inputs, self._weight("weight_ih").transpose(1, 2)).view(k, t, b, 4 * u)
        recurrent = self._weight("weight_hh").transpose(1, 2)
        cells, squashed, states = (inputs.new_empty(k, t, b, u) for _ in range(3))
        for now in range(t):
            gate = gates[:, now]
            if now:
                gate.baddbmm_(states[:, now - 1], recurrent)
            gate[..., : 2 * u].sigmoid_()
            gate[..., 2 * u : 3 * u].tanh_()
            gate[..., 3 * u :].sigmoid_()
            cell = torch.mul(gate[..., :u], gate[..., 2 * u : 3 * u], out=cells[:, now])
            if now:
                cell.addcmul_(gate[..., u : 2 * u], cells[:, now - 1])
            torch.tanh(cell, out=squashed[:, now])
            torch.mul(gate[..., 3 * u :], squashed[:, now], out=states[:, now])
        self.gates, self.cells, self.squashed, self.states = gates, cells, squashed, states
        return states

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Back through time; the weights' gradients in one product over all time steps."""
        k, t, b, u = gradient.shape
        recurrent = self._weight("weight_hh")
        back = torch.empty_like(self.gates)  # the gradient before the gates' nonlinearities
        later_state: Tensor | None = None
        later_cell: Tensor | None = None
        for now in range(t - 1, -1, -1):
            i, f, g, o = self.gates[:, now].chunk(4, -1)
            to_i, to_f, to_g, to_o = back[:, now].chunk(4, -1)
            state = gradient[:, now] if later_state is None else later_state.add_(gradient[:, now])
            cell = aten.tanh_backward(state * o, self.squashed[:, now])
            if later_cell is not None:
                cell.add_(later_cell)
            aten.sigmoid_backward.grad_input(state * self.squashed[:, now], o, grad_input=to_o)
            aten.sigmoid_backward.grad_input(cell * g, i, grad_input=to_i)
            aten.tanh_backward.grad_input(cell * i, g, grad_input=to_g)
            if now:
                aten.sigmoid_backward.grad_input(cell * self.cells[:, now - 1], f, grad_input=to_f)
                later_cell = cell.mul_(f)
                later_state = torch.bmm(back[:, now], recurrent)
            else:
                to_f.zero_()  # nothing came before
        flat = back.view(k, t * b, 4 * u)
        onward = torch.bmm(flat, self._weight("weight_ih")).view(k, t, b, -1)
        names = {kind: f"{self.prefix}{kind}{self.suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        targets, keep, slope = self.step.targets, self.step.keep, flat.transpose(1, 2)
        targets[names["weight_ih"]].baddbmm_(slope, self.inputs, beta=keep)
        targets[names["weight_hh"]].baddbmm_(slope[:, :, b:], self.states.view(k, t * b, u)[:, :-b], beta=keep)
        total = flat.sum(1)
        self.step.receive(names["bias_ih"], total)
        self.step.receive(names["bias_hh"], total)
        return onward


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
    """The rules for a network's layers, in order; None where it has a layer without a rule."""
    named = list(network.named_parameters(remove_duplicate=False))
    if len(named) > len(list(network.parameters())) or not all(p.requires_grad for _, p in named):
        return None  # weights that two layers share, or that are not trained
    if any(_is_hooked(module) for module in network.modules()) or any(p._backward_hooks for _, p in named):
        return None
    if type(network) is LSTM:
        return _of_lstm(network)
    if type(network) is not nn.Sequential:
        return None
    if len(list(network.children())) < len(network):
        return None  # a layer used twice has one weight for both
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
            table = WordTable(name)
            return [table, Pool(table, module.pooling)]
        case Words() if kind is Words and first:
            return [WordVectors(name)]
    return None


def _of_lstm(network: LSTM) -> list[Layer] | None:
    cells = network.lstm
    if cells.num_layers > 1 and cells.dropout > 0:
        return None  # PyTorch draws the factors between layers inside; they cannot be drawn alike here
    table = WordTable("embedding")
    found: list[Layer] = [table]
    found += [Recurrent("lstm.", f"_l{i}", cells.hidden_size) for i in range(cells.num_layers)]
    found.append(Pool(table, network.pooling))
    if network.dropout.p > 0:
        found.append(Dropout(network.dropout.p))
    return [*found, Linear("output", True)]


def _beside(weight: Tensor, values: Tensor) -> Tensor:
    """A weight of the last dimension, [k, width], shaped to meet values [k, ..., width]."""
    return weight.view(len(weight), *[1] * (values.dim() - 2), -1)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`: hooks, parametrizations."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")
