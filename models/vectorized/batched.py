"""Local training of K clients at once: the same steps as one by one, on stacked weights.

Clients are sorted by their number of steps. After each step, the first k clients that have steps left go on; the
weights and momenta of the others are not touched again. A batch that is smaller than the others is padded with examples
of weight zero, and its loss is divided by its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.examples import Examples, Selection, join
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models.local.augmentation import augment, augments
from fedveil.models.local.batches import is_plain, plan
from fedveil.models.local.correction import Correction, spread
from fedveil.models.local.inputs import kept_on, to_tensor
from fedveil.models.local.losses import losses_and_slopes
from fedveil.models.local.optimizers import Optimizer
from fedveil.models.networks import words
from fedveil.models.networks.recurrent import LSTM
from fedveil.models.vectorized.clipping import shares, without_bad
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.layers import Dropout, Layer, Step, Weighted
from fedveil.models.vectorized.rules import layers


class Chain:
    """A network computed by layer rules (`layers.py`), one after another."""

    unused: frozenset[str] = frozenset()  # every weight has a gradient

    def __init__(self, rules: Sequence[Layer]) -> None:
        self._rules = rules
        self._first = next(i for i, rule in enumerate(rules) if isinstance(rule, Weighted))

    def anew(self, network: nn.Module, fixed: dict[str, Tensor]) -> Chain:
        """Return a new chain, which holds no clients' tensors; `fixed`, the untrained weights, is empty for a chain."""
        return Chain(layers(network) or [])

    def bind(self, step: Step) -> None:
        """Set the weights and targets of the following calls."""
        self._step = step
        for rule in self._rules:
            rule.bind(step)

    def forward(self, inputs: Tensor, *, each: bool = False) -> Tensor:
        """Return logits [k, b, classes] or [k, b, t, vocabulary] of inputs [k, b, ...], which may be overwritten.

        each: the norms of each example's gradient are wanted afterwards
        """
        for rule in self._rules:
            rule.each = each
            inputs = rule.forward(inputs)
        return inputs

    def losses(self, inputs: Tensor, labels: Tensor, factors: Tensor, kind: str) -> Tensor:
        """Return each prediction's loss, [k, b] or [k, b, t], and write the weights' gradients to the step's targets.

        factors: the weight of each prediction in the objective, in the losses' shape
        """
        values, gradient = losses_and_slopes(self.forward(inputs), labels, kind)
        gradient = gradient.mul_(factors.unsqueeze(-1))
        for i in range(len(self._rules) - 1, self._first - 1, -1):
            rule = self._rules[i]
            gradient = rule.propagate(gradient, first=i == self._first)
            if isinstance(rule, Weighted):
                rule.write()
        return values

    def clipped(
        self, inputs: Tensor, labels: Tensor, factors: Tensor | None, parts: Tensor, kind: str, clip: float
    ) -> tuple[Tensor, Tensor | None]:
        """Write a sum over examples to the targets: each one's gradient shortened to the norm `clip`, times its part.

        factors: the weight of each prediction in its example's own objective, in the losses' shape; None: all 1
        parts: of each example in the sum, [k, b]; 0 for padding, which repeats an example of the same client

        Return each prediction's loss, and which examples counted, bool [k, b]: one whose norm is not finite adds
        nothing; None where all did. One forward and one backward give all norms, then one product each layer's sum
        (Lee and Kifer 2021).
        """
        values, squares = self._norms(inputs, labels, factors, kind)
        good = None
        if not math.isfinite(float(squares.sum())):
            good = (parts > 0) & squares.isfinite()
            values, squares = self._without_bad(inputs, labels, factors, kind, good)
            parts, squares = torch.where(good, parts, 0.0), torch.where(good, squares, 0.0)
        share = shares(squares, parts, clip)
        for rule in self._rules:
            if isinstance(rule, Weighted):
                rule.write(share)
        if good is not None:
            for target in self._step.targets.values():
                target[~good.any(1)] = 0.0
        return values, good

    def _without_bad(
        self, inputs: Tensor, labels: Tensor, factors: Tensor | None, kind: str, good: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute losses and norms with good examples in the place of the others; `good` may lose some more.

        Infinity times a factor of 0 is no number, so examples that do not count may not be computed either.
        """
        drawn = [rule.factors for rule in self._rules if isinstance(rule, Dropout)]
        step = self._step
        while True:
            inputs, labels = without_bad(inputs, good), without_bad(labels, good)
            factors = None if factors is None else without_bad(factors, good)
            self.bind(replace(step, drop=_Repeat(drawn)))
            values, squares = self._norms(inputs, labels, factors, kind)
            if bool((squares.isfinite() | ~good).all()):
                self.bind(step)
                return values, squares
            good &= squares.isfinite()

    def _norms(self, inputs: Tensor, labels: Tensor, factors: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        """Return each prediction's loss and the squared norm of each example's gradient, [k, b]."""
        values, gradient = losses_and_slopes(self.forward(inputs, each=True), labels, kind)
        if factors is not None:
            gradient.mul_(factors.unsqueeze(-1))
        squares: Tensor | None = None
        for i in range(len(self._rules) - 1, self._first - 1, -1):
            rule = self._rules[i]
            gradient = rule.propagate(gradient, first=i == self._first)
            if isinstance(rule, Weighted):
                squares = rule.squares() if squares is None else squares.add_(rule.squares())
        assert squares is not None
        return values, squares


def batched(network: nn.Module, inputs: Tensor) -> Chain | Functional | str:
    """Return a way to compute `network` for many clients at once, or the reason, in words, why there is none.

    inputs: a few examples, on which the result is compared with the network
    """
    rules = layers(network)
    if rules is None and type(network) is LSTM:
        return "dropout between layers of an LSTM is drawn by PyTorch inside, and cannot be each client's own"
    if rules is not None and _agrees(network, chain := Chain(rules), inputs):
        return chain
    return Functional.of(network, inputs)


def _agrees(network: nn.Module, chain: Chain, inputs: Tensor) -> bool:
    """Say whether chain and network have the same outputs; a user's Sequential may use layers unlike FedVeil's."""
    weights = {name: parameter.detach().unsqueeze(0) for name, parameter in network.named_parameters()}
    chain.bind(Step(weights, weights, 0.0, lambda share, like: torch.ones_like(like)))
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            wanted = network(inputs)
            try:
                found = chain.forward(inputs.unsqueeze(0).clone()).squeeze(0)
            except (RuntimeError, ValueError, IndexError):
                return False  # the rules do not support these shapes
            return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    finally:
        network.train(training)


def shared(clients: Sequence[Examples]) -> Examples | None:
    """Return the data set that all clients select their examples from; None where there is no such one."""
    first = clients[0]
    if isinstance(first, Selection) and all(isinstance(c, Selection) and c.source is first.source for c in clients):
        return first.source
    return None


def source(clients: Sequence[Examples]) -> tuple[Examples, list[np.ndarray]]:
    """Return examples that hold those of all clients, and each client's rows of them.

    Clients that select from one data set share it without a copy, and one client has its own; else all examples are
    concatenated.
    """
    if (held := shared(clients)) is not None:
        return held, [client.rows for client in clients if isinstance(client, Selection)]
    if len(clients) == 1:
        held = clients[0].take(slice(None))  # other array objects, whose copies on a GPU do not outlive this training
        return held, [np.arange(len(held))]
    ends = np.cumsum([len(client) for client in clients])
    own = [np.arange(end - len(client), end) for client, end in zip(clients, ends, strict=True)]
    return join(clients), own


def train_together(
    how: Chain | Functional,
    network: nn.Module,
    weights: dict[str, Tensor],
    clients: Sequence[Examples],
    settings: Training,
    learning_rate: float,
    streams: Sequence[Stream],
    correction: Correction,
    moves: Collection[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Train K clients at once; return each client's mean loss, float64 [K], and number of steps, int64 [K].

    weights: the initial weights, each [K, ...]; they are trained in place
    clients: sorted by number of steps, descending
    correction: is added to every gradient; its tensors are [...] for all clients or [K, ...]
    moves: names of the weights to train; None: all that the network trains
    """
    device = next(iter(weights.values())).device
    held, own_rows = source(clients)
    inputs, truth = kept_on(held.features, device), kept_on(held.labels, device)
    todo = plan(own_rows, settings, streams)
    trained = {name: weights[name] for name, p in network.named_parameters() if p.requires_grad}
    trainable = {name: value for name, value in trained.items() if moves is None or name in moves}
    still = {name: value for name, value in trained.items() if name not in trainable}
    plain = is_plain(settings, correction) and isinstance(how, Chain)
    # where all word tables are trained, and no row without a gradient can change, only the rows in use are computed
    restricted = (
        not (plain or settings.weight_decay or correction.moves_all)
        and words.tables(network).keys() <= trainable.keys()
    )
    tables = words.tables(network) if restricted else {}
    ids: Tensor | None = None
    if tables:
        used, ids = _used_words(held.features, own_rows, len(next(iter(tables.values()))), device)
        trainable |= {name: torch.take_along_dim(weights[name], used.unsqueeze(-1), 1) for name in tables}
    gradients = trainable if plain else {name: torch.empty_like(w) for name, w in trainable.items()}
    fixed = {name: weights[name][0] for name in weights.keys() - trained.keys()}
    how = how.anew(network, fixed)
    work = Work(how.bind, settings, learning_rate, correction, trainable, gradients, still, Dropper(streams))
    pictures = [stream.generator("augmentation") for stream in streams] if augments(settings) else []

    rows, sizes = to_tensor(todo.rows, device), to_tensor(todo.sizes, device)  # [S, K, B], [S, K]
    answers = truth.index_select(0, rows.view(-1)).view(*rows.shape, *truth.shape[1:])  # [S, K, B] or [S, K, B, t]
    real, predictions = torch.arange(rows.shape[2], device=device) < sizes.unsqueeze(-1), sizes
    if held.mask is not None:
        real = kept_on(held.mask, device).index_select(0, rows.view(-1)).view(answers.shape) & real.unsqueeze(-1)
        predictions = real.sum((2, 3))
    # the weights of a mean over each client's own batch
    factors = real.to(work.kind) / predictions.clamp(min=1).view(*predictions.shape, *[1] * (real.dim() - 2))
    if plain:
        factors *= -learning_rate  # the gradient is then the step, which is added to the weights
    values = torch.zeros(answers.shape, dtype=work.kind, device=device)
    memory = inputs.new_empty(rows[0].numel(), *inputs.shape[1:])
    clients_left, widths = (todo.sizes > 0).sum(1).tolist(), todo.sizes.max(1).tolist()
    with torch.no_grad():
        for s, (k, b) in enumerate(zip(clients_left, widths, strict=True)):
            chosen = torch.index_select(inputs, 0, rows[s, :k, :b].reshape(-1), out=memory[: k * b])
            chosen = chosen.view(k, b, *inputs.shape[1:])
            if not chosen.is_floating_point():
                chosen = chosen.long()
            if ids is not None:
                chosen = ids[:k].gather(1, chosen.view(k, -1)).view(chosen.shape)
            for j, rng in enumerate(pictures[:k]):
                own = todo.sizes[s, j]
                chosen[j, :own] = augment(chosen[j, :own], settings, rng)
            work.drop.sizes = todo.sizes[s, :k]
            work.bind(k)
            values[s, :k, :b] = how.losses(chosen, answers[s, :k, :b], factors[s, :k, :b], settings.loss)
            if not plain:
                work.update(how.unused)
    for name in tables:
        weights[name].scatter_(1, used.unsqueeze(-1).expand_as(trainable[name]), trainable[name])
    total = torch.where(real, values, 0).sum([d for d in range(real.dim()) if d != 1], dtype=torch.float64)
    return total.cpu().numpy() / predictions.sum(0).cpu().numpy(), (todo.sizes > 0).sum(0)


class Work:
    """The weights of a chunk of clients in their local steps: their gradients, the correction, the optimiser.

    slopes: the gradients of the clients that are bound, each [k, ...]; with plain SGD the weights
    """

    slopes: dict[str, Tensor]

    def __init__(
        self,
        compute: Callable[[Step], None],
        settings: Training,
        learning_rate: float,
        correction: Correction,
        weights: dict[str, Tensor],
        gradients: dict[str, Tensor],
        still: dict[str, Tensor],
        drop: Dropper,
    ) -> None:
        """Prepare the steps.

        compute: sets the weights and targets of what computes the gradients, whenever they change
        weights: the weights to train, each [K, ...]; gradients: memory for their gradients, or `weights` for plain SGD
        still: weights that get a gradient but are not trained here, each [K, ...]
        """
        self._compute, self._settings, self._correction = compute, settings, correction
        self._weights, self._gradients, self._plain = weights, gradients, gradients is weights
        self._still, self._unread = still, {name: torch.zeros_like(value) for name, value in still.items()}
        anchor = correction.anchor or {name: value.clone() for name, value in weights.items() if correction.mu > 0}
        self._anchor = {name: spread(anchor[name], value) for name, value in weights.items() if correction.mu > 0}
        self._shift = {
            name: spread(value, weights[name]) for name, value in correction.shift.items() if name in weights
        }
        self._optimizer = Optimizer(settings, learning_rate)
        self._k = -1
        self.drop, self.kind = drop, next(iter(weights.values())).dtype

    def bind(self, k: int) -> None:
        """Let the first k clients compute."""
        if k == self._k:
            return
        self._k = k
        self._now = {name: w[:k] for name, w in self._weights.items()}
        self.slopes = self._now if self._plain else {name: g[:k] for name, g in self._gradients.items()}
        all_now = self._now | {name: w[:k] for name, w in self._still.items()}
        targets = self.slopes | {name: g[:k] for name, g in self._unread.items()}
        still = frozenset(self._still)
        self._compute(Step(all_now, targets, 1.0 if self._plain else 0.0, self.drop, still))

    def update(self, unused: Collection[str] = ()) -> None:
        """Correct the gradients in `slopes`, and make a step of the optimiser; `unused`: weights that have none."""
        self._adjust()
        given = [None if name in unused else slope for name, slope in self.slopes.items()]
        self._optimizer.step(list(self._now.values()), given)

    def _adjust(self) -> None:
        """Add mu (w - anchor) + shift, then clip each client's gradient as a whole."""
        for name, anchor in self._anchor.items():  # a weight without a gradient stays where it started
            self.slopes[name].add_(self._now[name] - anchor[: self._k], alpha=self._correction.mu)
        for name, shift in self._shift.items():
            self.slopes[name].add_(shift[: self._k])
        if self._settings.max_grad_norm is not None:
            squares = [slope.reshape(len(slope), -1).square().sum(1) for slope in self.slopes.values()]
            norms = torch.stack(squares).sum(0).sqrt()  # [k]
            share = (self._settings.max_grad_norm / (norms + 1e-6)).clamp_(max=1.0)  # as torch's clip_grad_norm_
            for slope in self.slopes.values():
                slope.mul_(share.view(-1, *[1] * (slope.dim() - 1)))


class _Repeat:
    """Dropout factors that were drawn before, in the order of the layers."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._left = iter(factors)

    def __call__(self, share: float, like: Tensor) -> Tensor:
        """Return the next layer's factors."""
        return next(self._left)


class Dropper:
    """Dropout factors, drawn as PyTorch draws them on a CPU for each client's own batch.

    sizes: int64 [k], the batch sizes of the present step
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._draws: list[torch.Generator] = []
        self.sizes = np.zeros(0, np.int64)

    def __call__(self, share: float, like: Tensor) -> Tensor:
        """Draw a layer's factors for its inputs [k, b, ...]; those of examples beyond `sizes` are zero."""
        if not self._draws:
            self._draws = [torch.Generator().manual_seed(stream.integer("dropout")) for stream in self._streams]
        factors = torch.zeros(like.shape, dtype=like.dtype)
        for j, n in enumerate(self.sizes):
            own = torch.empty(int(n), *like.shape[2:], dtype=like.dtype)
            factors[j, :n] = own.bernoulli_(1 - share, generator=self._draws[j]).div_(1 - share)
        return factors.to(like.device)


def _used_words(
    features: np.ndarray, own_rows: Sequence[np.ndarray], vocabulary_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the word-table rows each client uses, int64 [K, u], and each word's index in them, int64 [K, vocabulary].

    Where a client uses fewer than u words, the rest is the row of padding, which does not change.
    """
    used = [words.own_rows(features[rows], vocabulary_size)[0] for rows in own_rows]
    table = np.zeros((len(used), max(len(rows) for rows in used)), np.int64)
    places = np.zeros((len(used), vocabulary_size), np.int64)
    for k, rows in enumerate(used):
        table[k, : len(rows)] = rows
        places[k, rows] = np.arange(len(rows))
    return to_tensor(table, device), to_tensor(places, device)
