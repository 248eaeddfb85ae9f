"""Named random streams: every random choice of an experiment draws from a stream named by its purpose.

A stream is addressed by `(seed, purpose, round, client)` and counter-based (Philox, Salmon et al. 2011; SplitMix64
where a cohort draws at once). So a choice depends on no choice before it: not on the number of workers, the order of clients, or whether the run was resumed. Keys
and masks of protections never come from here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_GAMMA, _MIX = np.uint64(0x9E3779B97F4A7C15), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Stream:
    """The random streams of one client in one round (`round` and `client` are 0 for choices of the whole run)."""

    seed: int
    round: int = 0
    client: int = 0

    def generator(self, purpose: str) -> np.random.Generator:
        """Return a NumPy generator for `purpose`; the same address always gives the same numbers."""
        return np.random.Generator(np.random.Philox(self._sequence(purpose)))

    def integer(self, purpose: str) -> int:
        """Return a 63-bit seed for a generator of another library (`torch.Generator`, `random.Random`)."""
        return int(self._sequence(purpose).generate_state(1, np.uint64)[0] >> 1)

    def _sequence(self, purpose: str) -> np.random.SeedSequence:
        name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
        return np.random.SeedSequence(self.seed, spawn_key=(name, self.round, self.client))


def keys(streams: Sequence[Stream], purpose: str, counters: np.ndarray) -> np.ndarray:
    """Return the random numbers that K streams have at the same counters, uint64 [K, ...].

    counters: uint64 [...]

    Each client draws by SplitMix64 (Steele, Lea & Flood 2014), which is as quick for a cohort as for one client: its
    state is the draw at the client's number, from what seed, round and purpose give.
    """
    roots = np.array([_root(stream.seed, stream.round, purpose) for stream in streams], np.uint64)
    states = _split_mix(roots, np.array([stream.client for stream in streams], np.uint64))
    return _split_mix(states.reshape(-1, *[1] * counters.ndim), counters)


@lru_cache
def _root(seed: int, number: int, purpose: str) -> int:
    return Stream(seed, number).integer(purpose)


def _split_mix(state: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Return the number at a counter, from 0, of the generator with a state, uint64."""
    z: np.ndarray = (counter + np.uint64(1)) * _GAMMA + state
    z ^= z >> np.uint64(30)
    z *= _MIX[0]
    z ^= z >> np.uint64(27)
    z *= _MIX[1]
    z ^= z >> np.uint64(31)
    return z


@contextmanager
def global_random(stream: Stream, purpose: str) -> Iterator[None]:
    """Seed Python's and NumPy's global generators from a stream, and restore their states afterwards.

    Use it only around library code that reads global state: Flower samples nodes with `random.sample`.
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
    """Seed PyTorch's global generator from a stream, and restore its state afterwards.

    For initial weights and dropout of any `nn.Module`: PyTorch's layers take no generator.
    cuda: seed the GPUs' generators too; a process that has touched a GPU cannot fork workers that use it
    """
    import torch

    seed = stream.integer(purpose)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes eight times as long on a CPU
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
