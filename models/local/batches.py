"""Batches of local training: those of one client, the plan of many clients, and the chunks of a cohort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedveil.core.randomness import Stream, keys
from fedveil.core.settings.sections import Training
from fedveil.models.local.correction import Correction
from fedveil.models.local.room import Limits

_INDEX = np.uint64(2**32 - 1)  # the low bits of a key hold its example's index


def batch_size_of(examples: int, settings: Training) -> int:
    """Return the batch size of a client with this number of examples."""
    return examples if settings.batch_size == "full" else min(settings.batch_size, examples)


def steps_of(examples: int, settings: Training) -> int:
    """Return the number of local steps of a client with this number of examples."""
    return settings.steps or settings.epochs * math.ceil(examples / batch_size_of(examples, settings))


def passes_of(examples: int, settings: Training) -> int:
    """Return the number of passes, the last perhaps cut short, of a client with this number of examples."""
    return math.ceil(steps_of(examples, settings) / math.ceil(examples / batch_size_of(examples, settings)))


def orders(examples: int, settings: Training, streams: Sequence[Stream], passes: range | None = None) -> np.ndarray:
    """Return the order of K clients' examples in each pass, int64 [K, passes, examples].

    examples: of each client
    streams: one for each client
    passes: the passes to order, counted from 0; all without it

    An order sorts counter-based random keys of a client's examples: a cohort's are made at once, and each is what the
    client has alone.
    """
    passes = range(passes_of(examples, settings)) if passes is None else passes
    column, row = np.arange(examples, dtype=np.uint64), np.arange(passes.start, passes.stop, dtype=np.uint64)
    order = keys(streams, "batches", row[:, None] << np.uint64(32) | column)
    order >>= np.uint64(1)  # signed integers, which GPUs sort, are then in the same order
    order &= ~_INDEX
    order |= column  # no two are equal, so that every way to sort gives one result
    order.sort(axis=-1)
    order &= _INDEX
    return order.view(np.int64)


@dataclass(frozen=True)
class Plan:
    """The batches of K clients in S steps; clients are sorted by number of steps, descending.

    rows: int64 [S, K, B], indices into the source of examples; any of them where a batch has no example
    sizes: int64 [S, K], how many of the B belong to the batch; 0 for a client that has finished
    """

    rows: np.ndarray
    sizes: np.ndarray


def plan(own_rows: Sequence[np.ndarray], settings: Training, streams: Sequence[Stream]) -> Plan:
    """Plan the batches of clients.

    own_rows: each client's rows of the source of examples, int64 [n_k]; clients sorted by number of steps, descending
    streams: one for each client
    """
    counts = np.array([len(rows) for rows in own_rows])
    widths = [batch_size_of(n, settings) for n in counts.tolist()]
    most = steps_of(int(counts[0]), settings)
    rows = np.zeros((most, len(counts), max(widths)), np.int64)
    sizes = np.zeros((most, len(counts)), np.int64)
    for n in np.unique(counts).tolist():
        some = np.flatnonzero(counts == n).tolist()
        width, steps = widths[some[0]], steps_of(n, settings)
        order = orders(n, settings, [streams[k] for k in some])  # [k, passes, n]
        own = np.stack([own_rows[k] for k in some])
        each = math.ceil(n / width)  # steps of a pass
        padded = np.zeros((*order.shape[:2], each * width), np.int64)
        padded[..., :n] = np.take_along_axis(own[:, None], order, axis=2)
        rows[:steps, some, :width] = padded.reshape(len(some), -1, width)[:, :steps].swapaxes(0, 1)
        step = np.arange(steps)[:, None]
        sizes[:steps, some] = np.minimum(width, n - step % each * width)
    return Plan(rows, sizes)


def is_plain(settings: Training, correction: Correction) -> bool:
    """Say whether a local step only adds the gradient, times a number, to the weights."""
    extras = settings.momentum or settings.weight_decay or settings.max_grad_norm or correction.mu or correction.shift
    return settings.optimizer == "sgd" and not extras


def cut(
    sizes: np.ndarray, settings: Training, weights: int, example: int, limits: Limits | None = None
) -> list[np.ndarray]:
    """Cut a cohort into chunks of clients that train at once: positions in the cohort, those with most steps first.

    sizes: int64 [n], examples of each client
    weights, example: number of values in the network, and in one example
    limits: of a chunk on a GPU; None: the clients train on a CPU
    The chunks depend on the cohort, the network and the limits, not on the number of workers. On a CPU there are about
    eight chunks, which cores share evenly, of 5 to 16 clients: more make no client cheaper.
    """
    steps = np.array([steps_of(int(n), settings) for n in sizes])
    widths = np.array([batch_size_of(int(n), settings) for n in sizes])
    order = np.lexsort((np.arange(len(sizes)), -widths, -steps))
    copies = 2 if is_plain(settings, Correction()) else 5  # 5: weights, gradients, two moments, a copy of the start
    each = 4 * (copies * weights + int(widths.max()) * example)  # bytes of a client
    if limits is not None:
        # a plan is as long as its longest client's, so clients whose steps differ by a factor of two are kept apart
        levels = np.floor(np.log2(steps[order]))
        spans = np.split(order, np.flatnonzero(np.diff(levels)) + 1)
        most = max(1, min(limits.memory // each, limits.clients or len(sizes)))
    else:
        most = max(1, min(max(5, math.ceil(len(sizes) / 8)), 16, (1 << 30) // each))
        spans = [order]
    return [chunk for span in spans for chunk in np.array_split(span, math.ceil(len(span) / most))]
