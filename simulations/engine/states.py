"""The states of a simulation's clients in one store: durable states sparse on disk, a session's secrets in memory.

Each kind of state is a memory-mapped file of equal slots. A client that never wrote has no slot, so that of a million
clients only those that took part cost space. Nothing that a checkpoint names is overwritten: a new state takes a free
slot, and the old slot is free again only when the two newest checkpoints, which are both kept, do not name it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedveil.client.learning.states import State, StateKey
from fedveil.core.errors import SettingsError, TrainingError
from fedveil.core.foreign import reading

Layout = tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype and shape of each array


class DiskStates:
    """The store of all clients of a simulation (`client/learning/states.py`)."""

    def __init__(self, folder: Path, index: Mapping[str, np.ndarray] | None = None) -> None:
        """Open the store in a folder, which is made when a state is first kept.

        index: what `commit` returned for the checkpoint that the run resumes from
        Raise SettingsError where the files are not those of the index.
        """
        self._folder = folder
        self._session: dict[tuple[int, str], State] = {}
        self._slabs: dict[str, _Slab] = {}
        damaged = f"{folder}: the checkpoint's index of what clients keep between rounds is damaged"
        with reading(lambda why: SettingsError(f"{damaged} ({why}); put it back, or start a new run")):
            for name, array in (index or {}).items():
                key, _, part = name.partition("/")
                if part == "slots":
                    layout = _read_layout(index[f"{key}/layout"])  # type: ignore[index]
                    self._slabs[key] = _Slab(folder / key, layout, dict(array.tolist()))

    def get(self, client: int, key: StateKey) -> State | None:
        """Return a client's state, a copy of it where it is durable, or None."""
        if not key.durable:
            return self._session.get((client, key.name))
        slab = self._slabs.get(key.name)
        return None if slab is None else slab.get(client)

    def put(self, client: int, key: StateKey, state: State) -> None:
        """Keep a client's state in place of its last one; raise TrainingError where its layout differs from others'."""
        if not key.durable:
            self._session[client, key.name] = state
            return
        layout: Layout = tuple((name, value.dtype.str, value.shape) for name, value in state.items())
        if key.name not in self._slabs:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._slabs[key.name] = _Slab(self._folder / key.name, layout)
        slab = self._slabs[key.name]
        if slab.layout != layout:
            raise TrainingError(
                f"client {client} keeps '{key.name}' as {layout}, and others keep it as {slab.layout}; all must be alike"
            )
        slab.put(client, state)

    def drop(self, client: int, key: StateKey) -> None:
        """Forget a state; one that is not there is no error."""
        if not key.durable:
            self._session.pop((client, key.name), None)
        elif key.name in self._slabs:
            self._slabs[key.name].drop(client)

    def commit(self) -> dict[str, np.ndarray]:
        """Write durable states to disk, and return what a checkpoint must hold to find them: arrays by name."""
        index: dict[str, np.ndarray] = {}
        for name, slab in self._slabs.items():
            index[f"{name}/slots"] = slab.commit()
            index[f"{name}/layout"] = np.frombuffer(json.dumps(slab.layout).encode(), np.uint8)
        return index


class _Slab:
    """Slots of equal size in a file, and which client's state each one holds."""

    def __init__(self, path: Path, layout: Layout, slots: dict[int, int] | None = None) -> None:
        """Make the file, or open that of an earlier process, in which clients have `slots`.

        Raise SettingsError where that file is missing or cut off.
        """
        self.layout, self._path, self._slots = layout, path, slots or {}
        self._ends = np.cumsum([0, *(np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in layout)])
        self._width = max(int(self._ends[-1]), 1)
        self._unnamed: list[int] = []  # slots that the newest checkpoint does not name, but the one before does
        self._replaced: list[int] = []  # slots that the newest checkpoint names, and the next will not
        self._new: set[int] = set()  # slots written since the newest checkpoint
        if slots is None:
            path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        elif not path.is_file() or path.stat().st_size < (max(slots.values(), default=-1) + 1) * self._width:
            raise SettingsError(
                f"{path}: what clients keep between rounds is missing or cut off; put it back, or start a new run"
            )
        self._map(max(8, path.stat().st_size // self._width))
        used = set(self._slots.values())
        self._free = [slot for slot in range(len(self._memory) - 1, -1, -1) if slot not in used]

    def _map(self, capacity: int) -> None:
        """Make room for `capacity` slots; the file has holes where nothing was written."""
        os.truncate(self._path, capacity * self._width)
        self._memory = np.memmap(self._path, np.uint8, "r+", shape=(capacity, self._width))

    def get(self, client: int) -> State | None:
        """Return a copy of a client's state, or None."""
        slot = self._slots.get(client)
        if slot is None:
            return None
        row = np.array(self._memory[slot])
        return {
            name: row[start:end].view(kind).reshape(shape)
            for (name, kind, shape), start, end in zip(self.layout, self._ends, self._ends[1:], strict=False)
        }

    def put(self, client: int, state: State) -> None:
        """Write a client's state to a free slot."""
        if not self._free:
            before = len(self._memory)
            self._map(2 * before)
            self._free = list(range(2 * before - 1, before - 1, -1))
        slot = self._free.pop()
        row = self._memory[slot]
        for (name, _, _), start, end in zip(self.layout, self._ends, self._ends[1:], strict=False):
            row[start:end] = np.ascontiguousarray(state[name]).reshape(-1).view(np.uint8)
        self.drop(client)
        self._slots[client] = slot
        self._new.add(slot)

    def drop(self, client: int) -> None:
        """Drop a client's state, and free its slot when no kept checkpoint names it."""
        slot = self._slots.pop(client, None)
        if slot is None:
            return
        if slot in self._new:  # no checkpoint names it
            self._new.discard(slot)
            self._free.append(slot)
        else:
            self._replaced.append(slot)

    def commit(self) -> np.ndarray:
        """Write the slots to disk, and return each client with its slot: int64 [m, 2]."""
        if self._new:
            self._memory.flush()
        self._free += self._unnamed
        self._unnamed, self._replaced, self._new = self._replaced, [], set()
        return np.array(sorted(self._slots.items()), np.int64).reshape(-1, 2)


def _read_layout(array: np.ndarray) -> Layout:
    """Return the layout that a checkpoint holds; raise ValueError and others where it is none."""
    layout = tuple((name, kind, tuple(shape)) for name, kind, shape in json.loads(array.tobytes()))
    if any(np.dtype(kind).hasobject or any(side < 0 for side in shape) for _, kind, shape in layout):
        raise ValueError("a layout of arrays that FedVeil does not keep")
    return layout
