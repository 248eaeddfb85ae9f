"""DP-SGD: local training that differential privacy protects, example by example (Abadi et al. 2016, algorithm 1).

A step takes each example by a coin of its own (Poisson sampling, an empty batch included), shortens each example's
gradient to the norm C, adds N(0, (z C)^2) to each number of their sum, and divides by the expected size of the batch,
which is known without looking at the data. What the optimiser, its schedule and a correction make of that sum looks at
no example. Every trained number gets noise in every step, those included that no example uses, such as the vectors of
words that a client does not have; the vector of padding is no trained number.

Gradients are of the network's type, float32 but in tests. Noise of float64 is added to them in float64, and the result
is rounded to their type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream, torch_random
from fedveil.core.settings.sections import Training
from fedveil.models.local.augmentation import augment, augments
from fedveil.models.local.batches import batch_size_of, is_plain, steps_of
from fedveil.models.local.correction import Correction
from fedveil.models.local.dropout import HostDropout
from fedveil.models.local.inputs import kept_on
from fedveil.models.vectorized.batched import Chain, Dropper, Work, batched, source
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.layers import Step
from fedveil.models.vectorized.looped import Looped

Draw = Callable[[int], np.ndarray]  # size -> float64 or float32 [size]
COINS = 1 << 16  # successes that are drawn at once, 2 MiB
MOST = 4096  # examples of a client that are computed at once


@dataclass(frozen=True)
class Draws:
    """The randomness of one client's private training.

    normal: draws standard normal numbers, for the noise; uniform: numbers in [0, 1), for the coins of batches
    """

    normal: Draw
    uniform: Draw


def seeded(stream: Stream) -> Draws:
    """Return randomness that can be repeated, for simulations: whoever knows the seed can remove the noise.

    The noise has the 24 bits of float32, in a third of the time of float64: it shows what noise does to a model, and
    protects nobody.
    """
    noise = torch.Generator().manual_seed(stream.integer("example noise"))
    coins = np.random.Generator(np.random.SFC64(stream.integer("example coins")))
    return Draws(lambda size: torch.empty(size).normal_(generator=noise).numpy(), coins.random)


@dataclass(frozen=True)
class Private:
    """What protects the examples of K clients in their training.

    clip: C, the largest norm of one example's part in the sum of a batch
    deviations: z of each client's noise, in units of C, float64 [K]; 0: no noise, where their sum gets it
    draws: the randomness of a client, asked for anew whenever its training begins; `seeded` is for simulations alone
    """

    clip: float
    deviations: np.ndarray
    draws: Callable[[Stream], Draws]

    def of(self, clients: Sequence[int]) -> Private:
        """Return the same for some of the K clients, by position."""
        return replace(self, deviations=self.deviations[list(clients)])


def check_private(settings: Training) -> None:
    """Raise SettingsError where `settings` cannot be used with private training."""
    if settings.max_grad_norm is not None:
        raise SettingsError(
            f"training.max_grad_norm = {settings.max_grad_norm}: shortens a batch's gradient, and with privacy.unit = "
            "'example' privacy.clip shortens each example's; remove training.max_grad_norm"
        )


def rate_of(examples: int, settings: Training) -> float:
    """Return the chance of each example to be in a step's batch, for a client with this number of examples."""
    return batch_size_of(examples, settings) / examples


def made_up(network: nn.Module, features: np.ndarray) -> Tensor:
    """Return three examples of the form of `features` for `private_way`: no choice may depend on a client's own."""
    shape = (3, *features.shape[1:])
    numbers = torch.arange(math.prod(shape)).view(shape)
    device = next(network.parameters()).device
    if np.issubdtype(features.dtype, np.floating):
        return torch.frac(numbers * 0.618034).to(device, torch.from_numpy(features[:0]).dtype)
    sizes = [module.num_embeddings for module in network.modules() if isinstance(module, nn.Embedding)]
    return (numbers % max(min(sizes, default=2) - 1, 1) + 1).to(device)  # words alone: padding is at the end of a text


def private_way(network: nn.Module, inputs: Tensor) -> Chain | Functional | Looped:
    """Return how each example's gradient is bounded: by layer rules, else by `torch.func`, else one after another.

    inputs: a few examples, on which the results are compared with the network's
    Raise SettingsError for batch norm, with which there is no gradient of one example.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            raise SettingsError(
                f"privacy.unit = 'example': layer '{name}' normalises by the other examples of the batch, so that one "
                "example's part in a step cannot be bounded; use torch.nn.LayerNorm or GroupNorm"
            )
    found = batched(network, inputs)
    loop = Looped(network)
    if isinstance(found, str):
        return loop
    return found if isinstance(found, Chain) or _agree(found, loop, network, inputs) else loop


def _agree(found: Functional, loop: Looped, network: nn.Module, inputs: Tensor) -> bool:
    """Say whether both clip the gradients of `inputs` alike; `torch.func` is wrong for some layers."""
    weights = {name: p.detach().unsqueeze(0) for name, p in network.named_parameters() if p.requires_grad}
    sums: list[dict[str, Tensor]] = []
    with torch.no_grad():
        labels = torch.zeros(1, *network(inputs).shape[:-1], dtype=torch.int64, device=inputs.device)
        parts = next(iter(weights.values())).new_full((1, len(inputs)), 1 / len(inputs))
        for way in (found, loop):
            sums.append({name: torch.zeros_like(value) for name, value in weights.items()})
            way.bind(Step(weights, sums[-1], 0.0, lambda share, like: torch.ones_like(like)))
            try:
                way.clipped(inputs.unsqueeze(0), labels, None, parts, "cross_entropy", 1.0)
            except (RuntimeError, ValueError, IndexError):
                return False
    one, other = sums
    return all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in weights)


def poisson_batches(examples: int, rate: float, steps: int, uniform: Draw) -> Iterator[np.ndarray]:
    """Yield for each step the examples that a coin of chance `rate` each puts into its batch, ascending, int64.

    All steps' coins are one row. The gaps between its successes are geometric, so about one draw is enough for each
    success (Devroye 1986, section X.2).
    """
    if rate >= 1:
        yield from repeat(np.arange(examples), steps)
        return
    block = max(1, int(COINS // (rate * examples + 1)))
    for start in range(0, steps, block):
        ends = np.arange(1, min(block, steps - start) + 1) * examples
        chosen = _successes(int(ends[-1]), rate, uniform)
        for end, own in zip(ends, np.split(chosen, np.searchsorted(chosen, ends[:-1])), strict=True):
            yield own - (end - examples)


def _successes(coins: int, rate: float, uniform: Draw) -> np.ndarray:
    """Return which of some coins succeed, ascending, int64."""
    if rate > 0.25:
        return np.flatnonzero(uniform(coins) < rate)
    scale, mean = 1 / math.log1p(-rate), rate * coins
    more = int(mean + 4 * math.sqrt(mean)) + 4
    found, last = [], -1.0
    while last < coins:
        found.append(np.cumsum(np.floor(np.log1p(-uniform(more)) * scale) + 1.0) + last)
        last = float(found[-1][-1])
    chosen = np.concatenate(found)
    return chosen[chosen < coins].astype(np.int64)


def train_private(
    how: Chain | Functional | Looped,
    network: nn.Module,
    weights: dict[str, Tensor],
    clients: Sequence[Examples],
    settings: Training,
    learning_rate: float,
    streams: Sequence[Stream],
    correction: Correction,
    moves: Collection[str] | None,
    private: Private,
) -> tuple[np.ndarray, np.ndarray]:
    """Train K clients at once by DP-SGD; return each client's mean loss, float64 [K], and number of steps, int64 [K].

    weights: the initial weights, each [K, ...]; they are trained in place
    clients: sorted by number of steps, descending; `Looped` takes one
    correction: is added to every noised gradient; its tensors are [...] for all clients or [K, ...]
    moves: names of the weights to train; None: all that the network trains

    A loss tells of the data, and no epsilon covers it. It is 0 where all batches were empty.
    """
    device = next(iter(weights.values())).device
    held, own_rows = source(clients)
    counts = [len(rows) for rows in own_rows]
    steps = np.array([steps_of(n, settings) for n in counts])
    trained = {name: weights[name] for name, p in network.named_parameters() if p.requires_grad}
    trainable = {name: value for name, value in trained.items() if moves is None or name in moves}
    still = {name: value for name, value in trained.items() if name not in trainable}
    fixed = {name: weights[name][0] for name in weights.keys() - trained.keys()}
    gradients = {name: torch.empty_like(value) for name, value in trainable.items()}
    how = how.anew(network, fixed)
    work = Work(how.bind, settings, learning_rate, correction, trainable, gradients, still, Dropper(streams))
    plain = is_plain(settings, correction)
    draws = [private.draws(stream) for stream in streams]
    coins = [
        poisson_batches(n, rate_of(n, settings), int(number), own.uniform)
        for n, number, own in zip(counts, steps, draws, strict=True)
    ]
    expected = np.array([batch_size_of(n, settings) for n in counts])
    noise = _Noise(network, private, draws, expected)
    batches = _Batches(held, own_rows, settings, streams, expected, work.kind, device)
    told = torch.zeros(len(clients), dtype=torch.float64, device=device)
    seen = np.zeros(len(clients))
    with torch.no_grad(), _global_dropout(streams[0], device) if isinstance(how, Looped) else nullcontext():
        for s in range(int(steps[0])):
            k = int((steps > s).sum())
            chosen = [next(own) for own in coins[:k]]
            sums: dict[str, Tensor] = {}
            for piece in batches.pieces(chosen):
                here = len(piece.sizes)
                work.bind(here)
                work.drop.sizes = piece.sizes
                values, good = how.clipped(
                    piece.inputs, piece.labels, piece.factors, piece.parts, settings.loss, private.clip
                )
                losses, predictions = piece.losses(values, good)
                told[:here] += losses
                seen[:here] += predictions
                if not sums and not piece.last:
                    sums = {name: slope.clone() for name, slope in work.slopes.items()}
                elif sums:
                    for name, slope in work.slopes.items():
                        sums[name][:here] += slope
            work.bind(k)
            for name, slope in work.slopes.items():
                if sums:
                    slope.copy_(sums[name])
                elif not any(map(len, chosen)):
                    slope.zero_()
            noise.add(work.slopes)
            if plain:  # which the optimiser does as well, in several times the time for few weights
                for name, slope in work.slopes.items():
                    trainable[name][:k].add_(slope, alpha=-learning_rate)
            else:
                work.update()
    return told.cpu().numpy() / np.maximum(seen, 1), steps


@dataclass(frozen=True)
class _Piece:
    """Examples of a step's batches that are computed at once; batches are padded.

    inputs: [k, b, ...]; labels: [k, b] or [k, b, t]
    factors: of each prediction in its example's mean loss, [k, b, t]; None where an example has one
    parts: of each example's gradient in its client's step, [k, b]; 0 for padding
    expected: the expected sizes of the batches, [k]
    sizes, predictions: how many examples belong to the batch, and how many predictions they have, [k]
    last: no piece of the same step follows
    """

    inputs: Tensor
    labels: Tensor
    factors: Tensor | None
    parts: Tensor
    expected: Tensor
    sizes: np.ndarray
    predictions: np.ndarray
    last: bool

    def losses(self, values: Tensor, good: Tensor | None) -> tuple[Tensor, np.ndarray]:
        """Return the sum of the losses of examples that counted, float64 [k], and the number of their predictions."""
        if good is None and self.factors is None:
            return (values * self.parts).sum(1, dtype=torch.float64) * self.expected, self.predictions
        counted = self.parts > 0 if good is None else good
        if self.factors is not None:
            counted = (self.factors > 0) & counted.unsqueeze(-1)
        total = torch.where(counted, values, 0.0).flatten(1).sum(1, dtype=torch.float64)
        return total, self.predictions if good is None else counted.flatten(1).sum(1).cpu().numpy()


class _Batches:
    """The batches of K clients' steps, as tensors."""

    def __init__(
        self,
        held: Examples,
        own_rows: Sequence[np.ndarray],
        settings: Training,
        streams: Sequence[Stream],
        expected: np.ndarray,
        kind: torch.dtype,
        device: torch.device,
    ) -> None:
        self._expected = torch.from_numpy(expected).to(device)
        self._tokens = np.zeros(0) if held.mask is None else held.mask.sum(1)  # to predict, of each example
        self._own_rows, self._settings, self._kind, self._device = own_rows, settings, kind, device
        self._inputs, self._labels = kept_on(held.features, device), kept_on(held.labels, device)
        self._memory = self._inputs[:0]  # for one piece's inputs
        self._mask = None if held.mask is None else kept_on(held.mask, device)
        self._pictures = [stream.generator("augmentation") for stream in streams] if augments(settings) else []
        # one width for all clients: where batches are cut decides what dropout draws, and must not depend on the others
        size = MOST if settings.batch_size == "full" else settings.batch_size
        self._width = min(MOST, size + 4 * math.ceil(math.sqrt(size)))

    def pieces(self, chosen: Sequence[np.ndarray]) -> Iterator[_Piece]:
        """Cut one step's batches into pieces of bounded memory; clients whose batch has ended are left out at the end.

        chosen: each client's examples, int64 [any number]
        """
        longest = max(map(len, chosen))
        for start in range(0, longest, self._width):
            parts = [own[start : start + self._width] for own in chosen]
            while len(parts[-1]) == 0 and start:
                parts.pop()
            yield self._piece(parts, last=start + self._width >= longest)

    def _piece(self, parts: Sequence[np.ndarray], *, last: bool) -> _Piece:
        sizes = np.array([len(part) for part in parts])
        rows = np.empty((len(parts), sizes.max()), np.int64)
        for row, part, own in zip(rows, parts, self._own_rows, strict=False):
            row[: len(part)] = own[part]
            row[len(part) :] = own[part[0] if len(part) else 0]
        flat = torch.from_numpy(rows).view(-1).to(self._device)
        if len(self._memory) < len(flat):
            self._memory = self._inputs.new_empty(len(flat), *self._inputs.shape[1:])
        inputs = torch.index_select(self._inputs, 0, flat, out=self._memory[: len(flat)])
        inputs = inputs.view(*rows.shape, *inputs.shape[1:])
        if not inputs.is_floating_point():
            inputs = inputs.long()
        for j, rng in enumerate(self._pictures[: len(parts)]):
            if sizes[j]:
                inputs[j, : sizes[j]] = augment(inputs[j, : sizes[j]], self._settings, rng)
        labels = self._labels.index_select(0, flat).view(*rows.shape, *self._labels.shape[1:])
        real = np.arange(rows.shape[1]) < sizes[:, None]
        factors, predictions = None, sizes
        if self._mask is not None:
            counts = self._mask.index_select(0, flat).view(labels.shape).to(self._kind)
            factors = counts / counts.sum(2, keepdim=True).clamp(min=1)
            predictions = (self._tokens[rows] * real).sum(1)
        expected = self._expected[: len(sizes)]
        shared = expected.to(self._kind).reciprocal_().unsqueeze(1).expand(rows.shape)
        if not real.all():
            shared = torch.where(torch.from_numpy(real).to(self._device), shared, 0.0)
        return _Piece(inputs, labels, factors, shared, expected, sizes, predictions, last)


class _Noise:
    """The noise of K clients' steps."""

    def __init__(self, network: nn.Module, private: Private, draws: Sequence[Draws], expected: np.ndarray) -> None:
        """Take the clients' randomness; `expected`: the expected sizes of their batches."""
        self._deviations = [
            private.clip * float(z) / float(size) if z else 0.0
            for z, size in zip(private.deviations, expected, strict=True)
        ]
        self._draws = draws
        self._sums: dict[str, Tensor] = {}  # the last ones, and their rows by client, flat
        self._rows: list[list[Tensor]] = []
        self._padding = {
            f"{name}.weight" if name else "weight": module.padding_idx
            for name, module in network.named_modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add noise to the sums of the first k clients' gradients, each [k, ...], divided by the expected sizes."""
        if sums is not self._sums:
            k = len(next(iter(sums.values())))
            self._sums, self._rows = sums, [[value[j].view(-1) for value in sums.values()] for j in range(k)]
        for own, draws, deviation in zip(self._rows, self._draws, self._deviations, strict=False):
            if deviation == 0:
                continue
            sizes = [value.numel() for value in own]
            drawn = torch.from_numpy(draws.normal(sum(sizes))).to(own[0].device)
            for value, part in zip(own, torch.split(drawn, sizes), strict=True):
                value.add_(part, alpha=deviation)
        for name, row in self._padding.items():
            if name in sums:
                sums[name][:, row] = 0.0


@contextmanager
def _global_dropout(stream: Stream, device: torch.device) -> Iterator[None]:
    """Let dropout that a network draws itself come from a client's stream."""
    on_gpu = device.type == "cuda"
    with torch_random(stream, "dropout", cuda=on_gpu), HostDropout() if on_gpu else nullcontext():
        yield
