"""Rules for the layers of text networks: word tables, pooling, LSTMs.

Where a text becomes one vector, time comes before examples, [k, t, b, ...], so that the data of one time step is
contiguous. Where each position has its own output, the shape is [k, b, t, ...].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedveil.models.networks.words import PADDING
from fedveil.models.vectorized.layers import Layer, aten


@dataclass
class WordTable(Layer):
    """`Words` before pooling, int64 [k, b, t] -> [k, t, b, size]; the row of padding does not change."""

    name: str
    ids: Tensor = field(init=False)  # [k * t * b], rows of all clients' tables, concatenated
    real: Tensor = field(init=False)  # bool [k, t, b]

    def forward(self, inputs: Tensor) -> Tensor:
        """Look up the words, without the columns that are padding in every text."""
        real = inputs != PADDING
        longest = max(int(real.sum(2).max()), 1)
        self.real = real[:, :, :longest].transpose(1, 2)
        return self.look_up(inputs[:, :, :longest].transpose(1, 2))

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the vectors of words, int64 [k, ...] -> [k, ..., size]."""
        table = self.step.weights[f"{self.name}.weight"]  # [k, words, size]
        k, rows, size = table.shape
        start = torch.arange(k, device=ids.device).mul_(rows)[:, None, None]
        ids = (ids + start).contiguous()
        self.ids = ids.view(-1)
        return table.reshape(-1, size).index_select(0, self.ids).view(*ids.shape, size)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Add the gradient of each word that occurs to its row; the row of padding gets none."""
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
        """Look up the words, padding included."""
        return self.look_up(inputs)


@dataclass
class Pool(Layer):
    """The `pool` of `words.py`, [k, t, b, size] -> [k, b, size]: a sum over words, each with its own factor."""

    weighted = False

    table: WordTable
    pooling: str
    factors: Tensor = field(init=False)  # [k, t, b, 1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum, the mean, or the last word's vector."""
        real = self.table.real.to(inputs.dtype)
        if self.pooling == "mean":
            real = real / real.sum(1, keepdim=True).clamp_(min=1)
        elif self.pooling == "last":  # the word that no word follows
            real = real - nn.functional.pad(real[:, 1:], (0, 0, 0, 1))
        self.factors = real.unsqueeze(-1)
        return (inputs * self.factors).sum(1)

    def backward(self, gradient: Tensor, first: bool) -> Tensor:
        """Distribute the gradient over the words: [k, b, size] -> [k, t, b, size]."""
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
        """Compute the inputs' part of all gates in one product, then one time step after another."""
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
        """Propagate back through time, then compute the weights' gradients in one product over all time steps."""
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
                to_f.zero_()  # there is no earlier cell
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
