"""Who sees which examples in which step: batches of one client, the plan of many, and how a cohort is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models.local.correction import Correction


def batch_size_of(examples: int, settings: Training) -> int:
    """Examples in a step of a client that holds so many."""
    return examples if settings.batch_size == "full" else min(settings.batch_size, examples)


def steps_of(examples: int, settings: Training) -> int:
    """Steps of a client that holds so many examples."""
    return settings.steps or settings.epochs * math.ceil(examples / batch_size_of(examples, settings))


def orders(examples: int, settings: Training, stream: Stream) -> np.ndarray:
    """The order in which a client sees its examples, int64 [passes, examples]: a new one each pass."""
    steps_a_pass = math.ceil(examples / batch_size_of(examples, settings))
    passes = math.ceil(steps_of(examples, settings) / steps_a_pass)
    rng = stream.generator("batches")
    return np.stack([rng.permutation(examples) for _ in range(passes)])


@dataclass(frozen=True)
class Plan:
    """Which examples each of K clients sees in each of S steps; K sorted by number of steps, falling.

    rows: int64 [S, K, B], of the source; sizes: int64 [S, K], how many of the B count; 0 for who has finished
    """

    rows: np.ndarray
    sizes: np.ndarray


def plan(own_rows: Sequence[np.ndarray], settings: Training, streams: Sequence[Stream]) -> Plan:
    """The steps of clients that hold the rows `own_rows` (each int64 [n_k]) of a source of examples."""
    counts = [len(rows) for rows in own_rows]
    widths = [batch_size_of(n, settings) for n in counts]
    steps = [steps_of(n, settings) for n in counts]
    rows = np.zeros((steps[0], len(counts), max(widths)), np.int64)
    sizes = np.zeros((steps[0], len(counts)), np.int64)
    for k, (own, stream) in enumerate(zip(own_rows, streams, strict=True)):
        n, width = counts[k], widths[k]
        order = own[orders(n, settings, stream)]  # [passes, n]
        each = math.ceil(n / width)
        padded = np.full((len(order), each * width), own[0])
        padded[:, :n] = order
        rows[: steps[k], k, :width] = padded.reshape(-1, width)[: steps[k]]
        size = np.full((len(order), each), width)
        size[:, -1] = n - (each - 1) * width
        sizes[: steps[k], k] = size.reshape(-1)[: steps[k]]
    return Plan(rows, sizes)


def is_plain(settings: Training, correction: Correction) -> bool:
    """Whether a step adds the gradient to the weights, times a number, and does nothing else."""
    extras = settings.momentum or settings.weight_decay or settings.max_grad_norm or correction.mu or correction.shift
    return settings.optimizer == "sgd" and not extras


def cut(sizes: np.ndarray, settings: Training, weights: int, example: int, device: torch.device) -> list[np.ndarray]:
    """Cut a cohort into chunks to compute at once: positions, those with most steps first.

    sizes: int64 [n], examples of each client; weights, example: numbers in the network, and in one example
    The rule knows the cohort and the network, and nothing of workers: the same chunks whoever computes them. On a CPU
    about eight chunks, so that cores share them evenly, of 5 to 16 clients: more do not make a client cheaper.
    """
    steps = np.array([steps_of(int(n), settings) for n in sizes])
    widths = np.array([batch_size_of(int(n), settings) for n in sizes])
    order = np.lexsort((np.arange(len(sizes)), -widths, -steps))
    copies = 2 if is_plain(settings, Correction()) else 5  # weights; gradients, two moments, and a copy of the start
    each = 4 * (copies * weights + int(widths.max()) * example)  # bytes of a client
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 4
        # a plan is as long as the longest client's: where one has twice another's steps, they are planned apart
        levels = np.floor(np.log2(steps[order]))
        spans = np.split(order, np.flatnonzero(np.diff(levels)) + 1)
        most = max(1, memory // each)
    else:
        most = max(1, min(max(5, math.ceil(len(sizes) / 8)), 16, (1 << 30) // each))
        spans = [order]
    return [chunk for span in spans for chunk in np.array_split(span, math.ceil(len(span) / most))]
