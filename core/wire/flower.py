"""What every folder needs of Flower beyond its public interface (Flower 1.41).

Public are `flwr.app`, `flwr.clientapp`, `flwr.serverapp`, `flwr.serverapp.strategy` and `flwr.simulation`. All else of Flower
is touched in one file a folder: this one, `client/flower.py`, `server/flower.py` and `simulations/flower.py`.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.app.exception import AppExitException  # what Flower's strategies end a run with
from flwr.common.constant import ErrorCode  # the codes of `flwr.app.Error`, which are public nowhere
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["NUMPY", "AppExitException", "ErrorCode", "LazyArray", "act_as", "array_record", "identify"]

NUMPY = "numpy.ndarray"  # the `stype` of arrays as `np.save` writes them


class LazyArray(Array):
    """A Flower `Array` over a NumPy array, turned into bytes only when somebody reads `data`.

    In one process nobody does: a strategy asks for `.numpy()`, which is the array itself. It must not be
    written to. Flower's own `Array` serialises when it is made.
    """

    def __init__(self, ndarray: np.ndarray) -> None:
        self.__dict__.update(dtype=_name(ndarray.dtype), shape=ndarray.shape, stype=NUMPY, _ndarray=ndarray, _data=None)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array as `np.save` writes it, which is how Flower sends it."""
        if self.__dict__["_data"] is None:
            buffer = io.BytesIO()
            np.save(buffer, self.__dict__["_ndarray"], allow_pickle=False)
            self.__dict__["_data"] = buffer.getvalue()
        return self.__dict__["_data"]  # type: ignore[no-any-return]

    def numpy(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self.__dict__["_ndarray"]  # type: ignore[no-any-return]


LazyArray.__qualname__ = "Array"  # the name by which a node on another machine finds a class for the bytes
_name = lru_cache(maxsize=64)(str)  # of a dtype; NumPy makes it anew each time


def array_record(arrays: dict[str, Array]) -> ArrayRecord:
    """Make an ArrayRecord of arrays as they are."""
    record = ArrayRecord()
    # the constructor would serialise each array, and setting items one by one checks each key: a tenth of a round
    record.__dict__["_data"].update(arrays)
    return record


def act_as(run_id: int, node_id: int, task_id: int) -> None:
    """Say in whose name this process makes messages, which Flower's own runtimes set once a process."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def identify(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name; Flower gives one only where its own runtime sends it."""
    message.metadata.__dict__["_message_id"] = message_id
