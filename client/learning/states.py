"""A store of what clients keep between rounds, by client and kind of state.

On a client's own machine the store is the Flower context of its node; a simulation has one store for all of its clients
(`simulations/engine/states.py`), sparse and on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

State = Mapping[str, np.ndarray]
PREFIX = "fedveil.state"  # of a record in a node's context


@dataclass(frozen=True)
class StateKey:
    """One kind of state.

    durable: saved in a checkpoint; else it serves one session, and a resumed simulation begins without it
    """

    name: str
    durable: bool = True


class ClientStates(Protocol):
    """A store of named arrays by client and key."""

    def get(self, client: int, key: StateKey) -> State | None:
        """Return a client's state, or None where it keeps none by this key."""

    def put(self, client: int, key: StateKey, state: State) -> None:
        """Store a state in place of the one before."""

    def drop(self, client: int, key: StateKey) -> None:
        """Delete a state, if it is there."""


@dataclass(frozen=True)
class ContextStates:
    """The store of a Flower node: the records of its context, which may be of several clients."""

    records: RecordDict

    def get(self, client: int, key: StateKey) -> State | None:
        """Return a client's state, as `ClientStates.get`."""
        record = self.records.get(_record(client, key))
        return {name: array.numpy() for name, array in record.items()} if isinstance(record, ArrayRecord) else None

    def put(self, client: int, key: StateKey, state: State) -> None:
        """Store a state, as `ClientStates.put`.

        The arrays are copied, because a node's context may be pickled and stored.
        """
        self.records[_record(client, key)] = ArrayRecord({name: Array(value) for name, value in state.items()})

    def drop(self, client: int, key: StateKey) -> None:
        """Delete a state, as `ClientStates.drop`."""
        self.records.pop(_record(client, key), None)


def _record(client: int, key: StateKey) -> str:
    return f"{PREFIX}.{key.name}.{client}"


def to_state(blob: bytes) -> State:
    """Wrap bytes as a state."""
    return {"bytes": np.frombuffer(blob, np.uint8)}


def from_state(state: State | None) -> bytes | None:
    """Return the bytes of a state that `to_state` made."""
    return None if state is None else state["bytes"].tobytes()


def lend(states: ClientStates, client: int, keys: Iterable[StateKey], records: RecordDict) -> None:
    """Put a client's states into the records of a message, for a client that works in another process."""
    for key in keys:
        state = states.get(client, key)
        if state is not None:
            ContextStates(records).put(client, key, state)


def take_back(records: RecordDict, client: int, keys: Iterable[StateKey], states: ClientStates) -> None:
    """Move a client's states from the records of its reply to the store."""
    lent = ContextStates(records)
    for key in keys:
        state = lent.get(client, key)
        if state is not None:
            lent.drop(client, key)
            states.put(client, key, state)
