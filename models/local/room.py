"""How many clients a GPU trains at once: by the memory that was free when the run began, and fewer where it ran out.

The number of clients in a batched call can change last bits. So what was found is kept with a run, in one file that is
written before the next try, and a resumed run cuts each round as it was cut before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import reading
from fedveil.core.record.record import write_atomically
from fedveil.models.computing import free_memory

SHARE = 4  # a chunk's weights and batches may take this part of the free memory; gradients and data take more of it


@dataclass(frozen=True)
class Limits:
    """What a chunk of clients may take: memory in bytes, and a number of clients; None: any number."""

    memory: int
    clients: int | None = None


class Room:
    """The memory that clients have for training at once on a GPU, as it was found in the rounds so far."""

    def __init__(self, path: Path | None = None) -> None:
        """Begin with what the file at `path` has, where there is one; without a path nothing is kept.

        Raise SettingsError where the file is damaged.
        """
        self._path, self._memory = path, 0
        self._lacked: list[tuple[int, int, int]] = []  # round, first client and number of clients that did not fit
        if path is not None and path.exists():
            with reading(lambda why: SettingsError(f"{path}: is damaged ({why}); put it back, or start a new run")):
                found = json.loads(path.read_bytes())
                self._memory = int(found["memory"])
                self._lacked = [(int(number), int(first), int(n)) for number, first, n in found["lacked"]]

    def limits(self, number: int, device: torch.device) -> Limits:
        """Return the limits of chunks in round `number`; the memory that is free is measured at the first call."""
        if not self._memory:
            # a power of two, so that a few pages more or fewer of other programs change no cut
            self._memory = 1 << (max(free_memory(device) // SHARE, 1).bit_length() - 1)
            self._keep()
        earlier = [max(1, n // 2) for lacked, _, n in self._lacked if lacked < number]
        return Limits(self._memory, min(earlier, default=None))

    def lacked(self, number: int, first: int, clients: int) -> bool:
        """Say whether memory ran out for these clients of round `number` before, in this process or an earlier one."""
        return (number, first, clients) in self._lacked

    def note(self, number: int, first: int, clients: int) -> None:
        """Remember that in round `number` memory ran out for so many clients, of which `first` is the first."""
        self._lacked.append((number, first, clients))
        self._keep()

    def _keep(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
            content = {"memory": self._memory, "lacked": self._lacked}
            write_atomically(self._path, json.dumps(content).encode() + b"\n")
