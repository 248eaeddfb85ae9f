"""Rules for the layers of text networks: word tables, pooling, LSTMs.

Where a text becomes one vector, time comes before examples, [k, t, b, ...], so that the data of one time step is
contiguous. Where each position has its own output, the shape is [k, b, t, ...].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedveil.models.networks.words import PADDING
from fedveil.models.vectorized.layers import Layer, Weighted, aten
from fedveil.models.vectorized.norms import sequence_squares, squared_norms, word_slots


@dataclass
class WordTable(Weighted):
    """`Words` before pooling, int64 [k, b, t] -> [k, t, b, size]; the row of padding does not change."""

    name: str
    words: Tensor = field(init=False)  # int64 [k, t, b], or in the order of the outputs
    ids: Tensor = field(init=False)  # [k * t * b], rows of all clients' tables, concatenated
    real: Tensor = field(init=False)  # bool [k, t, b]
    slope: Tensor = field(init=False)  # the outputs' gradient

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
        self.words = ids
        start = torch.arange(k, device=ids.device).mul_(rows)[:, None, None]
        ids = (ids + start).contiguous()
        self.ids = ids.view(-1)
        return table.reshape(-1, size).index_select(0, self.ids).view(*ids.shape, size)

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Keep the gradient: words have none."""
        self.slope = gradient
        return gradient

    def write(self, factors: Tensor | None = None) -> None:
        """Add the gradient of each word that occurs to its row; the row of padding gets none."""
        self.add(self.ids, self.slope if factors is None else self.slope * self.beside(factors))

    def add(self, ids: Tensor, slope: Tensor) -> None:
        """Add the gradients of words' vectors to the words' rows."""
        target = self.step.targets[f"{self.name}.weight"]
        padding = target[:, PADDING].clone() if self.step.keep else 0.0
        if not self.step.keep:
            target.zero_()
        size = target.shape[-1]
        target.view(-1, size).index_add_(0, ids, slope.reshape(-1, size))
        target[:, PADDING] = padding

    def beside(self, factors: Tensor) -> Tensor:
        """Reshape numbers of examples, [k, b], to broadcast with the outputs."""
        return factors[:, None, :, None]

    def by_text(self, words: Tensor) -> Tensor:
        """Return words in the order [k, b, t]; the same call puts numbers of words back into the outputs' order."""
        return words.transpose(1, 2)

    def squares(self) -> Tensor:
        """Return the squared norm of each text's gradient, after those of a word that occurs twice were added up."""
        words = self.by_text(self.words)
        k, b, t = words.shape
        if not self.counts(f"{self.name}.weight"):
            return self.slope.new_zeros(k, b)
        texts = torch.arange(k * b, device=words.device).mul_(t + 1).view(k, b, 1)
        places = self.by_text(word_slots(words, PADDING) + texts).reshape(-1)
        size = self.slope.shape[-1]
        found = self.slope.new_zeros(k * b * (t + 1), size).index_add_(0, places, self.slope.reshape(-1, size))
        return found.view(k, b, t + 1, size)[:, :, :t].square().sum((2, 3))


@dataclass
class WordVectors(WordTable):
    """`Words` with an output for each position: int64 [k, b, t] -> [k, b, t, size]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Look up the words, padding included."""
        return self.look_up(inputs)

    def beside(self, factors: Tensor) -> Tensor:
        """Reshape numbers of examples, [k, b], to broadcast with the outputs."""
        return factors[:, :, None, None]

    def by_text(self, words: Tensor) -> Tensor:
        """Return the words, which are in this order."""
        return words


@dataclass
class PooledTable(WordTable):
    """`PooledWords`: int64 [k, b, t] -> [k, b, size]; all words of a text have one gradient, each times its factor.

    Where each example's norm is wanted, `words` are [k, b, t], `ids` and `texts` are of real words alone, int64 [m],
    most of a batch of short texts being padding, and `factors` are of texts, [k, b].
    """

    pooling: str = "mean"
    factors: Tensor = field(init=False)  # [k, t, b, 1]
    texts: Tensor = field(init=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Look up the words and pool their vectors."""
        if self.each:
            return self._forward_real(inputs)
        vectors = super().forward(inputs)
        self.factors = pooling_factors(self.real, vectors.dtype, self.pooling)
        return (vectors * self.factors).sum(1)

    def _forward_real(self, inputs: Tensor) -> Tensor:
        table = self.step.weights[f"{self.name}.weight"]
        k, rows, size = table.shape
        _, b, t = inputs.shape
        real = inputs != PADDING
        lengths = real.sum(2)
        self.words = inputs[:, :, : max(int(lengths.max()), 1)]
        places = real.view(-1).nonzero().squeeze(1)
        self.ids, self.texts = inputs.view(-1).index_select(0, places), places // t
        if k > 1:
            self.ids += self.texts // b * rows
        one = torch.ones_like(lengths, dtype=table.dtype)
        self.factors = one / lengths.clamp_(min=1) if self.pooling == "mean" else one
        vectors = table.reshape(-1, size).index_select(0, self.ids)
        total = vectors.new_zeros(k * b, size).index_add_(0, self.texts, vectors)
        return total.view(k, b, size).mul_(self.factors.unsqueeze(-1))

    def write(self, factors: Tensor | None = None) -> None:
        """Distribute the gradient over the words, and add it to their rows."""
        if factors is None:
            self.add(self.ids, self.slope.unsqueeze(1) * self.factors)
            return
        slope = self.slope * (factors * self.factors).unsqueeze(-1)
        self.add(self.ids, slope.flatten(0, 1).index_select(0, self.texts))

    def squares(self) -> Tensor:
        """Return |slope|^2 times the square of the factor, times the sum of squares of how often each word occurs."""
        k, b, t = self.words.shape
        if not self.counts(f"{self.name}.weight"):
            return self.slope.new_zeros(k, b)
        slots = word_slots(self.words, PADDING)
        often = self.slope.new_zeros(k, b, t + 1).scatter_add_(-1, slots, self.slope.new_ones(()).expand(slots.shape))
        return squared_norms(often[:, :, :t]).mul_(self.factors.square()).mul_(squared_norms(self.slope))


@dataclass
class Pool(Layer):
    """The `pool` of `words.py`, [k, t, b, size] -> [k, b, size]: a sum over words, each with its own factor."""

    table: WordTable
    pooling: str
    factors: Tensor = field(init=False)  # [k, t, b, 1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum, the mean, or the last word's vector."""
        self.factors = pooling_factors(self.table.real, inputs.dtype, self.pooling)
        return (inputs * self.factors).sum(1)

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Distribute the gradient over the words: [k, b, size] -> [k, t, b, size]."""
        return gradient.unsqueeze(1) * self.factors


def pooling_factors(words: Tensor, kind: torch.dtype, pooling: str) -> Tensor:
    """Return the factor of each word's vector in a text's sum, mean or last vector, [k, t, b, 1].

    words: which are no padding, bool [k, t, b]
    """
    real = words.to(kind)
    if pooling == "mean":
        real = real / real.sum(1, keepdim=True).clamp_(min=1)
    elif pooling == "last":  # the word that no word follows
        real = real - nn.functional.pad(real[:, 1:], (0, 0, 0, 1))
    return real.unsqueeze(-1)


@dataclass
class Recurrent(Weighted):
    """One layer of `nn.LSTM`, [k, t, b, in] -> [k, t, b, units] (Hochreiter and Schmidhuber 1997; gates i, f, g, o)."""

    prefix: str  # "lstm."
    suffix: str  # "_l0"
    units: int
    inputs: Tensor = field(init=False)
    gates: Tensor = field(init=False)  # [k, t, b, 4 units]
    cells: Tensor = field(init=False)
    squashed: Tensor = field(init=False)  # tanh of the cells
    states: Tensor = field(init=False)
    slope: Tensor = field(init=False)  # the gradient before the gates' nonlinearities, [k, t, b, 4 units]

    def _name(self, kind: str) -> str:
        return f"{self.prefix}{kind}{self.suffix}"

    def _weight(self, kind: str) -> Tensor:
        return self.step.weights[self._name(kind)]

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

    def propagate(self, gradient: Tensor, first: bool) -> Tensor:
        """Propagate back through time."""
        k, t, b, u = gradient.shape
        recurrent = self._weight("weight_hh")
        back = self.slope = torch.empty_like(self.gates)
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
        return torch.bmm(back.view(k, t * b, 4 * u), self._weight("weight_ih")).view(k, t, b, -1)

    def write(self, factors: Tensor | None = None) -> None:
        """Compute the weights' gradients in one product over all time steps."""
        k, t, b, gates = self.slope.shape
        flat = self.slope.view(k, t * b, gates)
        if factors is not None:
            flat = (self.slope * factors[:, None, :, None]).view(k, t * b, gates)
        names = {kind: self._name(kind) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        targets, keep, slope = self.step.targets, self.step.keep, flat.transpose(1, 2)
        targets[names["weight_ih"]].baddbmm_(slope, self.inputs, beta=keep)
        before = self.states.view(k, t * b, self.units)[:, :-b]
        targets[names["weight_hh"]].baddbmm_(slope[:, :, b:], before, beta=keep)
        total = flat.sum(1)
        self.step.receive(names["bias_ih"], total)
        self.step.receive(names["bias_hh"], total)

    def squares(self) -> Tensor:
        """Return the squared norms of sums over time, whose inputs are those of the layer and the earlier states."""
        k, t, b, _ = self.slope.shape
        inputs, states = self.inputs.view(k, t, b, -1), self.states
        seen = []
        if self.counts(self._name("weight_ih")):
            seen.append(inputs)
        if self.counts(self._name("weight_hh")):
            seen.append(nn.functional.pad(states[:, :-1], (0, 0, 0, 0, 1, 0)))  # nothing before the first word
        found = self.slope.new_zeros(k, b)
        if seen:
            both = torch.cat(seen, -1).transpose(1, 2)
            for j in range(k):
                found[j] = sequence_squares(both[j], self.slope[j].transpose(0, 1))
        biases = self.counts(self._name("bias_ih")) + self.counts(self._name("bias_hh"))
        return found.add_(self.slope.sum(1).square_().sum(-1), alpha=biases)
