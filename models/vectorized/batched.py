"""Training K clients at once: the same steps as one by one, on stacked weights.

Clients differ in size, so they are sorted by their number of steps; those that have done theirs leave, and the
others go on as the first k. A leaver's weights and momenta are then out of everybody's reach. A client's batch
that is smaller than the others' is padded with examples of weight zero, and divides by its own size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.layers import Layer, Step
from fedveil.models.vectorized.rules import layers


class Chain:
    """A network as a chain of layer rules (`layers.py`)."""

    unused: frozenset[str] = frozenset()  # every weight has a gradient

    def __init__(self, rules: Sequence[Layer]) -> None:
        self._rules = rules
        self._first = next(i for i, rule in enumerate(rules) if rule.weighted)

    def anew(self, network: nn.Module, fixed: dict[str, Tensor]) -> Chain:
        """One that holds no tensors of clients yet; a network with weights that are not trained (`fixed`) has no chain."""
        return Chain(layers(network) or [])

    def bind(self, step: Step) -> None:
        """Compute with these weights from now on."""
        for rule in self._rules:
            rule.bind(step)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [k, b, classes] or [k, b, t, vocabulary] of inputs [k, b, ...], which may be written over."""
        for rule in self._rules:
            inputs = rule.forward(inputs)
        return inputs

    def losses(self, inputs: Tensor, labels: Tensor, factors: Tensor, kind: str) -> Tensor:
        """The loss of each prediction, [k, b] or [k, b, t]; the gradient of their sum, weighed by `factors`, goes to the targets."""
        values, gradient = losses_and_slopes(self.forward(inputs), labels, kind)
        gradient = gradient.mul_(factors.unsqueeze(-1))
        for i in range(len(self._rules) - 1, self._first - 1, -1):
            gradient = self._rules[i].backward(gradient, first=i == self._first)
        return values


def batched(network: nn.Module, inputs: Tensor) -> Chain | Functional | str:
    """How to compute `network` for many clients at once; why it cannot be, in words, where it cannot.

    inputs: a few examples, to compare with the network itself
    """
    rules = layers(network)
    if rules is None and type(network) is LSTM:
        return "dropout between layers of an LSTM is drawn by PyTorch inside, and cannot be each client's own"
    if rules is not None and _agrees(network, chain := Chain(rules), inputs):
        return chain
    return Functional.of(network, inputs)


def _agrees(network: nn.Module, chain: Chain, inputs: Tensor) -> bool:
    """Whether the rules give what the network gives; a user's Sequential may use a layer in another way than ours."""
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
                return False  # shapes that the rules do not know
            return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    finally:
        network.train(training)


def source(clients: Sequence[Examples]) -> tuple[Examples, list[np.ndarray]]:
    """What all clients' examples are rows of, and each client's rows.

    Clients of one data set share its arrays, which are not copied; others' examples are laid end to end.
    """
    first = clients[0]
    if isinstance(first, Selection) and all(isinstance(c, Selection) and c.source is first.source for c in clients):
        rows = [client.rows for client in clients if isinstance(client, Selection)]
        return first.source, rows
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
    """Train clients whose `weights` (each [K, ...]) hold where they start; sorted by number of steps, falling.

    correction: of every gradient; its tensors are shared or [K, ...]
    moves: names of the weights that training changes; every one that the network trains without it
    Returns each client's mean loss (float64 [K]) and steps (int64 [K]); `weights` are trained in place.
    """
    device = next(iter(weights.values())).device
    held, own_rows = source(clients)
    inputs, truth = kept_on(held.features, device), kept_on(held.labels, device)
    todo = plan(own_rows, settings, streams)
    trained = {name: weights[name] for name, p in network.named_parameters() if p.requires_grad}
    trainable = {name: value for name, value in trained.items() if moves is None or name in moves}
    still = {name: value for name, value in trained.items() if name not in trainable}
    plain = is_plain(settings, correction) and isinstance(how, Chain)
    # where every word table is trained, and nothing moves a row without a gradient, only the rows in use are computed
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
    work = _Work(
        how.anew(network, fixed), settings, learning_rate, correction, trainable, gradients, still, _Dropper(streams)
    )
    pictures = [stream.generator("augmentation") for stream in streams] if augments(settings) else []

    rows, sizes = to_tensor(todo.rows, device), to_tensor(todo.sizes, device)  # [S, K, B], [S, K]
    answers = truth.index_select(0, rows.view(-1)).view(*rows.shape, *truth.shape[1:])  # [S, K, B] or [S, K, B, t]
    real, predictions = torch.arange(rows.shape[2], device=device) < sizes.unsqueeze(-1), sizes
    if held.mask is not None:
        real = kept_on(held.mask, device).index_select(0, rows.view(-1)).view(answers.shape) & real.unsqueeze(-1)
        predictions = real.sum((2, 3))
    # each client's mean over the predictions of its own batch
    factors = real.to(work.kind) / predictions.clamp(min=1).view(*predictions.shape, *[1] * (real.dim() - 2))
    if plain:
        factors *= -learning_rate  # what goes to the weights is the step itself
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
            values[s, :k, :b] = work.step(chosen, answers[s, :k, :b], factors[s, :k, :b])
    for name in tables:
        weights[name].scatter_(1, used.unsqueeze(-1).expand_as(trainable[name]), trainable[name])
    total = torch.where(real, values, 0).sum([d for d in range(real.dim()) if d != 1], dtype=torch.float64)
    return total.cpu().numpy() / predictions.sum(0).cpu().numpy(), (todo.sizes > 0).sum(0)


class _Work:
    """The steps of a chunk of clients: forward, loss, backward, correction, update."""

    def __init__(
        self,
        how: Chain | Functional,
        settings: Training,
        learning_rate: float,
        correction: Correction,
        weights: dict[str, Tensor],
        gradients: dict[str, Tensor],
        still: dict[str, Tensor],
        drop: _Dropper,
    ) -> None:
        """`still`: weights that the network trains and this training does not; each [K, ...], as `weights` are."""
        self._how, self._settings, self._correction = how, settings, correction
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

    def step(self, inputs: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
        """One step of the first k clients; the loss of each prediction, [k, b] or [k, b, t].

        factors: of each prediction's loss in its client's objective; 0 for padding
        """
        k = len(inputs)
        if k != self._k:
            self._k = k
            self._now = {name: w[:k] for name, w in self._weights.items()}
            self._slopes = self._now if self._plain else {name: g[:k] for name, g in self._gradients.items()}
            all_now = self._now | {name: w[:k] for name, w in self._still.items()}
            targets = self._slopes | {name: g[:k] for name, g in self._unread.items()}
            self._how.bind(Step(all_now, targets, 1.0 if self._plain else 0.0, self.drop))
        values = self._how.losses(inputs, labels, factors, self._settings.loss)
        if not self._plain:
            self._adjust()
            unused = self._how.unused
            given = [None if name in unused else slope for name, slope in self._slopes.items()]
            self._optimizer.step(list(self._now.values()), given)
        return values

    def _adjust(self) -> None:
        """Add mu (w - anchor) + shift, then clip each client's gradient as a whole."""
        for name, anchor in self._anchor.items():  # a weight without a gradient stays where it started
            self._slopes[name].add_(self._now[name] - anchor[: self._k], alpha=self._correction.mu)
        for name, shift in self._shift.items():
            self._slopes[name].add_(shift[: self._k])
        if self._settings.max_grad_norm is not None:
            squares = [slope.reshape(len(slope), -1).square().sum(1) for slope in self._slopes.values()]
            norms = torch.stack(squares).sum(0).sqrt()  # [k]
            share = (self._settings.max_grad_norm / (norms + 1e-6)).clamp_(max=1.0)  # as torch's clip_grad_norm_
            for slope in self._slopes.values():
                slope.mul_(share.view(-1, *[1] * (slope.dim() - 1)))


class _Dropper:
    """Dropout's factors, drawn as PyTorch draws them on a CPU for each client's own batch.

    sizes: int64 [k], examples in the batches of the clients at work
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._draws: list[torch.Generator] = []
        self.sizes = np.zeros(0, np.int64)

    def __call__(self, share: float, like: Tensor) -> Tensor:
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
    """The word-table rows each client uses, int64 [K, u], and each word's place among them, int64 [K, vocabulary].

    Clients that use fewer than u words have the rest filled with padding's row, which nothing changes.
    """
    used = [words.own_rows(features[rows], vocabulary_size)[0] for rows in own_rows]
    table = np.zeros((len(used), max(len(rows) for rows in used)), np.int64)
    places = np.zeros((len(used), vocabulary_size), np.int64)
    for k, rows in enumerate(used):
        table[k, : len(rows)] = rows
        places[k, rows] = np.arange(len(rows))
    return to_tensor(table, device), to_tensor(places, device)
