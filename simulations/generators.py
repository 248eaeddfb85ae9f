"""The global generators of Python, NumPy and PyTorch of each party of an app: its server, and every client.

In Flower's runtimes these are processes of their own. In one process a client that seeds a generator would seed the
server's too, which then draws the same nodes, or the same noise, in every round.
"""

from __future__ import annotations

import random
import secrets
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedveil.core.randomness import Stream

KINDS = ("python", "numpy", "torch")


@dataclass(frozen=True)
class States:
    """States of the global generators; `cuda`: of each GPU, where this process uses them."""

    python: tuple[int, array[int], float | None]  # its numbers as they are in memory, a seventh of the tuple
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> States:
        """Return the present states."""
        version, numbers, half = random.getstate()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls((version, array("I", numbers), half), np.random.get_state(), torch.get_rng_state(), cuda)

    def put(self) -> None:
        """Make these the present states."""
        version, numbers, half = self.python
        random.setstate((version, tuple(numbers), half))
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class Parties:
    """The generators of an app's parties; outside of `client` those of its server are the present ones."""

    def __init__(self, seed: int | None) -> None:
        """Seed each client's generators from `seed`, or without one from the system."""
        self._seed = secrets.randbits(63) if seed is None else seed
        self._states: dict[int, States] = {}  # by node
        self._imported: dict[str, States] = {}  # by kind of generator, where the app seeds it as it is imported

    @contextmanager
    def importing(self, module: str, *, server: bool) -> Iterator[None]:
        """Import a party's module within the block; what the server's seeds itself, and not what it imports, is its own."""
        before = None if server else States.now()
        seeds: set[str] = set()
        with _noticed(seeds, module if server else ""):
            yield
        now = States.now()
        self._imported |= dict.fromkeys(seeds, now)
        if before is not None:
            before.put()  # in Flower the server does not import what its clients do

    @contextmanager
    def client(self, node: int) -> Iterator[None]:
        """Let the generators be those of a node's client within the block."""
        server = States.now()
        self._enter(node)
        try:
            yield
        finally:
            self._states[node] = States.now()
            server.put()

    def _enter(self, node: int) -> None:
        if node in self._states:
            self._states[node].put()
            return
        seed = Stream(self._seed, client=node).integer("app's client")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        now = States.now()
        chosen = {kind: getattr(self._imported.get(kind, now), kind) for kind in KINDS}
        States(**chosen, cuda=self._imported["torch"].cuda if "torch" in self._imported else now.cuda).put()


@contextmanager
def _noticed(seeds: set[str], besides: str) -> Iterator[None]:
    """Note which generators are seeded within the block, but for those that the module `besides` seeds."""
    kept: list[tuple[Any, str, Callable[..., Any]]] = []

    def watch(owner: Any, name: str, kind: str) -> None:
        seed = getattr(owner, name)
        kept.append((owner, name, seed))

        def noticing(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals.get("__name__") != besides:
                seeds.add(kind)
            return seed(*args, **kwargs)

        setattr(owner, name, noticing)

    watch(random, "seed", "python")
    watch(np.random, "seed", "numpy")
    watch(torch, "manual_seed", "torch")
    try:
        yield
    finally:
        for owner, name, seed in kept:
            setattr(owner, name, seed)
