"""Named random streams: every choice of an experiment draws from a stream named by what it is for.

A stream is addressed by `(seed, purpose, round, client)` and counter-based (Philox, Salmon et al. 2011), so
no choice depends on which other choices were made before it: not on the number of workers, not on the order
of clients, not on whether the run was resumed. Keys and masks of protections never come from here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stream:
    """The random streams of one client in one round (`round` and `client` are 0 for choices of the whole run)."""

    seed: int
    round: int = 0
    client: int = 0

    def generator(self, purpose: str) -> np.random.Generator:
        """A NumPy generator for `purpose`; the same address always gives the same numbers."""
        return np.random.Generator(np.random.Philox(self._sequence(purpose)))

    def integer(self, purpose: str) -> int:
        """A 63-bit seed for a generator of another library (`torch.Generator`, `random.Random`)."""
        return int(self._sequence(purpose).generate_state(1, np.uint64)[0] >> 1)

    def _sequence(self, purpose: str) -> np.random.SeedSequence:
        name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
        return np.random.SeedSequence(self.seed, spawn_key=(name, self.round, self.client))


@contextmanager
def global_random(stream: Stream, purpose: str) -> Iterator[None]:
    """Set Python's and NumPy's global generators from a stream, and put their states back afterwards.

    For library code that reads global state (Flower samples nodes with `random.sample`), and nothing else.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = stream.integer(purpose)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def torch_random(stream: Stream, purpose: str, *, cuda: bool = False) -> Iterator[None]:
    """Set PyTorch's global generator from a stream, and put its state back afterwards.

    For initial weights and dropout of any `nn.Module`: PyTorch's layers take no generator of their own.
    cuda: those of the GPUs too; a process that has touched a GPU can fork no workers that do
    """
    import torch

    seed = stream.integer(purpose)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes eight times as long on a CPU
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
