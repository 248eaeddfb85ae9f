"""Local training of clients, each on its own examples and with its own random stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream, torch_random
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.computing import lacks_memory, memory_for, too_large
from fedveil.models.local.augmentation import augment, augments
from fedveil.models.local.batches import batch_size_of, orders, passes_of, steps_of
from fedveil.models.local.correction import Correction, pick, spread
from fedveil.models.local.dropout import HostDropout
from fedveil.models.local.inputs import compute, device_of, kept_on, to_tensor
from fedveil.models.local.losses import loss
from fedveil.models.local.optimizers import Optimizer
from fedveil.models.local.private import Private, check_private, made_up, private_way, train_private
from fedveil.models.local.room import Room
from fedveil.models.networks import words
from fedveil.models.vectorized.batched import Chain, shared, train_together
from fedveil.models.vectorized.functional import Functional
from fedveil.models.vectorized.looped import Looped

ORDERED = 1 << 18  # examples put in order at once, 2 MiB; another machine may ask for a billion epochs


@dataclass(frozen=True)
class Trained:
    """The result of the local training of K clients, in their order.

    parameters: each [K, ...], on the network's device
    loss: float64 [K], the mean over all predictions in training, without the terms of a correction
    examples: int64 [K], the number of each client's examples
    steps: int64 [K], the number of each client's optimiser steps
    """

    parameters: dict[str, Tensor]
    loss: np.ndarray
    examples: np.ndarray
    steps: np.ndarray


def check_training(task: Task, settings: Training) -> None:
    """Raise SettingsError where `settings` cannot be used for `task`."""
    if augments(settings) and task.kind != "images":
        key = next(key for key in ("shift", "rotation", "noise") if getattr(settings, key) > 0)
        raise SettingsError(
            f"training.{key} = {getattr(settings, key)}: changes images, and the data are {task.kind}; remove the setting"
        )


def train_clients(
    network: nn.Module,
    parameters: dict[str, Tensor],
    clients: Sequence[Examples],
    settings: Training,
    learning_rate: float,
    streams: Sequence[Stream],
    *,
    classes: int,
    correction: Correction | None = None,
    moves: Collection[str] | None = None,
    together: Chain | Functional | None = None,
    into: dict[str, Tensor] | None = None,
    room: Room | None = None,
    private: Private | None = None,
) -> Trained:
    """Train each client on its own examples (McMahan et al. 2017, algorithm 1, ClientUpdate).

    network: the network to compute with; its weights and mode are restored
    parameters: the initial weights, on the network's device, each [...] for all clients or [K, ...]; not changed
    learning_rate: of this round
    streams: one for each client, for batch order, dropout and augmentation
    classes: the number of labels; labels must be from 0 to classes - 1
    correction: is added to every gradient; None: the proximal term of `settings.proximal_mu` (Li et al. 2020,
        equation 2)
    moves: names of the weights to train; None: all that the network trains
    together: computes all clients at once (see `batched.batched`); None: one client after another, as private training
        also does where it computes one example after another
    into: memory for the clients' new weights, each [K, ...], on any device; None: new memory on the network's
    room: what is known of a GPU's memory, and is learned here
    private: protects each example by DP-SGD: batches are drawn by coins, and gradients clipped and noised; the losses
        that are returned are not protected. None: batches are passes over all examples

    A client's result does not depend on the others, except for the last bits where they are computed at once. Where a
    GPU lacks memory for all clients, they are computed in smaller groups. A loss may be infinite or NaN.
    Raise DataError for a client without examples or with a label out of range, or `parameters` of another network;
    SettingsError for settings or a network that `private` cannot protect; TrainingError where a GPU lacks memory for the data set or a single client.
    """
    correction = Correction(settings.proximal_mu) if correction is None else correction
    like = dict(network.named_parameters())
    weights.check_fit(network, {name: _of_one(tensor, like.get(name)) for name, tensor in parameters.items()})
    for client, stream in zip(clients, streams, strict=True):
        _check_client(client, stream, classes)
    way = None
    if private is not None:
        check_private(settings)
        way = private_way(network, made_up(network, clients[0].features))
    with memory_for(f"the weights of {len(clients)} clients"):
        results = into or {
            name: tensor.new_empty(len(clients), *like[name].shape) for name, tensor in parameters.items()
        }
    with weights.kept(network):
        network.train()
        asked = _Asked(
            network, parameters, results, clients, settings, learning_rate, streams, correction, moves, private, way
        )
        if together is None or isinstance(way, Looped):
            losses, steps = _one_by_one(asked)
        else:
            losses, steps = _together(way or together, asked, room or Room())
    return Trained(results, losses, np.array([len(client) for client in clients], dtype=np.int64), steps)


@dataclass(frozen=True)
class _Asked:
    """The training that `train_clients` is asked for.

    results: the clients' weights, each [K, ...], are written; way: computes private training
    """

    network: nn.Module
    parameters: dict[str, Tensor]
    results: dict[str, Tensor]
    clients: Sequence[Examples]
    settings: Training
    learning_rate: float
    streams: Sequence[Stream]
    correction: Correction
    moves: Collection[str] | None
    private: Private | None
    way: Chain | Functional | Looped | None

    @property
    def here(self) -> bool:
        """Whether the results lie on the device that computes."""
        return next(iter(self.results.values())).device == device_of(self.network)

    def like(self) -> dict[str, Tensor]:
        """Return tensors of the shapes of one client's weights, on the device that computes."""
        return {name: parameter.detach() for name, parameter in self.network.named_parameters()}


def _one_by_one(asked: _Asked) -> tuple[np.ndarray, np.ndarray]:
    """Train one client after another; return each one's mean loss and number of steps."""
    number, device, like = len(asked.clients), device_of(asked.network), asked.like()
    losses, steps = np.zeros(number), np.zeros(number, dtype=np.int64)
    for k, (client, stream) in enumerate(zip(asked.clients, asked.streams, strict=True)):
        with memory_for(f"client {stream.client}: training it alone"):
            for name, tensor in pick(asked.parameters, [k], like).items():
                asked.results[name][k].copy_(_of_one(tensor, like[name]))
            rows = {name: tensor[k] for name, tensor in asked.results.items()}
            own = {name: row.to(device) for name, row in rows.items()}  # the rows themselves where they lie there
            correction = asked.correction.of([k], like)
            if asked.way is not None and asked.private is not None:
                # a copy, because the alignment of weights in memory can change last bits, and differs among rows
                alone = {name: row.unsqueeze(0).clone() for name, row in own.items()}
                (losses[k],), (steps[k],) = train_private(
                    asked.way, asked.network, alone, [client], asked.settings, asked.learning_rate, [stream], correction,
                    asked.moves, asked.private.of([k]),
                )  # fmt: skip
                for name, row in own.items():
                    row.copy_(alone[name][0])
            else:
                losses[k], steps[k] = _train(
                    asked.network, own, client, asked.settings, asked.learning_rate, stream, correction, asked.moves
                )
            if not asked.here:
                for name, row in rows.items():
                    row.copy_(own[name])
    return losses, steps


def _together(how: Chain | Functional, asked: _Asked, room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Sort clients by their steps and train them at once, or in halves where a GPU lacks memory for all."""
    settings, sizes = asked.settings, [len(client) for client in asked.clients]
    everybody = list(range(len(sizes)))
    order = sorted(everybody, key=lambda k: (-steps_of(sizes[k], settings), -batch_size_of(sizes[k], settings)))
    losses, steps = np.zeros(len(sizes)), np.zeros(len(sizes), dtype=np.int64)
    _place_data(asked.clients, device_of(asked.network))
    waiting = [order]
    while waiting:
        part = waiting.pop()
        first = asked.streams[part[0]]
        known = room.lacked(first.round, first.client, len(part))
        done = None if known else _where_it_fits(how, asked, part, whole=part == everybody)
        if done is None:
            if len(part) == 1:
                raise too_large(f"client {first.client}: training it alone")
            if not known:
                room.note(first.round, first.client, len(part))
                torch.cuda.empty_cache()  # pieces of what was freed, each too small for the next try
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            continue
        losses[part], steps[part] = done
    return losses, steps


def _place_data(clients: Sequence[Examples], device: torch.device) -> None:
    """Copy a data set that all clients select from to a GPU, once; raise TrainingError where it does not fit."""
    held = shared(clients)
    if held is None:
        return
    arrays = [array for array in (held.features, held.labels, held.mask) if array is not None]
    size = sum(array.nbytes for array in arrays) / 1e9
    with memory_for(f"the data set, whose {len(held):,} training examples take {size:,.1f} GB,"):
        for array in arrays:
            kept_on(array, device)


def _where_it_fits(
    how: Chain | Functional, asked: _Asked, part: list[int], *, whole: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Train some clients, by position, at once, and write their results.

    whole: they are all clients, in order
    Return None where a GPU lacks memory for any of it, with all that was allocated freed again.
    """
    try:
        like = asked.like()
        in_place = whole and asked.here
        own = asked.results if in_place else {name: t.new_empty(len(part), *t.shape) for name, t in like.items()}
        for name, tensor in pick(asked.parameters, part, like).items():
            own[name].copy_(tensor)
        arguments = (
            how, asked.network, own, [asked.clients[k] for k in part], asked.settings, asked.learning_rate,
            [asked.streams[k] for k in part], asked.correction.of(part, like), asked.moves,
        )  # fmt: skip
        if asked.private is None:
            found = train_together(*arguments)
        else:
            found = train_private(*arguments, asked.private.of(part))
        if not in_place:
            rows = slice(part[0], part[-1] + 1) if part == list(range(part[0], part[-1] + 1)) else part
            for name, tensor in asked.results.items():
                tensor[rows] = own[name].to(tensor.device)
        return found
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return None


def _of_one(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """Return one client's part of a tensor [...] for all clients, or [K, ...]."""
    return tensor[0] if weight is not None and tensor.dim() == weight.dim() + 1 else tensor


def _check_client(client: Examples, stream: Stream, classes: int) -> None:
    if len(client) == 0:
        raise DataError(
            f"client {stream.client} has no examples to train on; set data.min_examples or fewer data.clients"
        )
    if client.mask is not None and not client.predictions:
        raise DataError(f"client {stream.client} has no token to predict: its masks are empty")
    low, high = int(client.labels.min()), int(client.labels.max())
    if not 0 <= low <= high < classes:
        of = f"{classes} classes" if client.mask is None else f"a vocabulary of {classes:,}"
        raise DataError(
            f"client {stream.client} has labels from {low} to {high}; with {of} they must be from 0 to {classes - 1}"
        )


def _train(
    network: nn.Module,
    own: dict[str, Tensor],
    client: Examples,
    settings: Training,
    learning_rate: float,
    stream: Stream,
    correction: Correction,
    moves: Collection[str] | None,
) -> tuple[float, int]:
    """Train one client; return its mean loss and number of steps.

    own: the client's initial weights, [...] by name; its new weights are written into them
    """
    device = device_of(network)
    features, rows = _place_start(network, own, client.features, settings, correction, moves)
    inputs, labels = to_tensor(features, device), to_tensor(client.labels, device)
    named = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (moves is None or name in moves)
    }
    trainable = list(named.values())
    anchor = _anchor(named, correction)
    shift = {name: spread(value, own[name].unsqueeze(0))[0] for name, value in correction.shift.items()}
    optimizer = Optimizer(settings, learning_rate)
    augmentation = stream.generator("augmentation") if augments(settings) else None
    mask = None if client.mask is None else to_tensor(client.mask, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    seen = steps = 0
    whose = f"client {stream.client}"
    on_gpu = device.type == "cuda"
    with torch_random(stream, "dropout", cuda=on_gpu), HostDropout() if on_gpu else nullcontext():
        for batch in _batches(len(client), settings, stream, device):
            chosen = inputs.index_select(0, batch)
            if augmentation is not None:
                chosen = augment(chosen, settings, augmentation)
            for parameter in network.parameters():
                parameter.grad = None
            real = None if mask is None else mask.index_select(0, batch)
            value = loss(compute(network, chosen, whose), labels.index_select(0, batch), settings.loss, real)
            value.backward()  # type: ignore[no-untyped-call]
            _correct(named, correction.mu, anchor, shift)
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
            optimizer.step([p.data for p in trainable], [p.grad for p in trainable])
            predictions = len(batch) if real is None else int(real.sum())
            total.add_(value.detach(), alpha=predictions)
            seen, steps = seen + predictions, steps + 1
    for name, parameter in network.named_parameters():
        own[name][rows[name]] = parameter.detach()
    return float(total) / seen, steps


def _place_start(
    network: nn.Module,
    own: dict[str, Tensor],
    features: np.ndarray,
    settings: Training,
    correction: Correction,
    moves: Collection[str] | None,
) -> tuple[np.ndarray, dict[str, Tensor | EllipsisType]]:
    """Give the network a copy of the weights `own`; of word tables, only the rows that `features` use.

    A copy, because the alignment of weights in memory can change last bits, and differs among rows of [K, ...].
    The unused rows have no gradient, and without weight decay no optimiser changes them: momentum and Adam start from
    zero, and the pull to the initial weights is zero there. Return the features, as indices into the rows that were
    kept, and for each weight the rows of `own` that it covers.
    """
    tables = words.tables(network) if settings.weight_decay == 0 and not correction.moves_all else {}
    if moves is not None and not tables.keys() <= set(moves):
        tables = {}
    rows: dict[str, Tensor | EllipsisType] = dict.fromkeys(own, ...)
    if tables:
        vocabulary_size = next(len(own[name]) for name in tables)
        used, features = words.own_rows(features, vocabulary_size)
        rows |= dict.fromkeys(tables, to_tensor(used, device_of(network)))
    weights.place(network, {name: tensor[rows[name]].clone() for name, tensor in own.items()})
    return features, rows


def _batches(n: int, settings: Training, stream: Stream, device: torch.device) -> Iterator[Tensor]:
    """Yield each step's examples, int64 [at most batch_size], a new order each pass; the last batch may be small."""
    left, passes, block = steps_of(n, settings), passes_of(n, settings), max(1, ORDERED // n)
    for start in range(0, passes, block):
        for order in orders(n, settings, [stream], range(start, min(start + block, passes)))[0]:
            batches = torch.split(torch.from_numpy(order).to(device), batch_size_of(n, settings))[:left]
            left -= len(batches)
            yield from batches


def _anchor(named: Mapping[str, nn.Parameter], correction: Correction) -> dict[str, Tensor]:
    """Return the anchor of each weight, by name; an empty dict without a pull."""
    if correction.mu == 0:
        return {}
    if correction.anchor is None:
        return {name: parameter.detach().clone() for name, parameter in named.items()}
    return {name: spread(correction.anchor[name], p.detach().unsqueeze(0))[0] for name, p in named.items()}


def _correct(
    named: Mapping[str, nn.Parameter], mu: float, anchor: Mapping[str, Tensor], shift: Mapping[str, Tensor]
) -> None:
    """Add mu (w - anchor) + shift to each gradient; weights that the loss does not depend on have none and stay."""
    for name, parameter in named.items():
        if parameter.grad is None:
            continue
        if name in anchor:
            parameter.grad.add_(parameter.detach() - anchor[name], alpha=mu)
        if name in shift:
            parameter.grad.add_(shift[name])
