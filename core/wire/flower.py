"""The non-public parts of Flower 1.41 that every folder needs.

Public are `flwr.app`, `flwr.clientapp`, `flwr.serverapp`, `flwr.serverapp.strategy` and `flwr.simulation`. Everything
else of Flower is used in four files: here, `client/flower.py`, `server/flower.py` and `simulations/flower.py`.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.app.exception import AppExitException  # by which Flower's strategies end a run
from flwr.common.constant import ErrorCode  # the codes of `flwr.app.Error`, which are not public
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["NUMPY", "AppExitException", "ErrorCode", "LazyArray", "act_as", "array_record", "identify"]

NUMPY = "numpy.ndarray"  # the `stype` of arrays as `np.save` writes them


class LazyArray(Array):
    """A Flower `Array` that serialises its NumPy array only when `data` is read.

    Within one process a strategy reads `.numpy()`, the array itself, so nothing is serialised. The array must not be
    written to. Flower's `Array` serialises on construction.
    """

    def __init__(self, ndarray: np.ndarray) -> None:
        self.__dict__.update(dtype=_name(ndarray.dtype), shape=ndarray.shape, stype=NUMPY, _ndarray=ndarray, _data=None)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array as `np.save` writes it, the form in which Flower sends it."""
        if self.__dict__["_data"] is None:
            buffer = io.BytesIO()
            np.save(buffer, self.__dict__["_ndarray"], allow_pickle=False)
            self.__dict__["_data"] = buffer.getvalue()
        return self.__dict__["_data"]  # type: ignore[no-any-return]

    def numpy(self) -> np.ndarray:
        """Return the array itself, not a copy."""
        return self.__dict__["_ndarray"]  # type: ignore[no-any-return]


LazyArray.__qualname__ = "Array"  # a node on another machine looks the class up by this name
_name = lru_cache(maxsize=64)(str)  # name of a dtype, which NumPy computes anew each time


def array_record(arrays: dict[str, Array]) -> ArrayRecord:
    """Return the arrays as an ArrayRecord, without serialising them."""
    record = ArrayRecord()
    # the constructor serialises each array, and setting items checks each key, which takes a tenth of a round
    record.__dict__["_data"].update(arrays)
    return record


def act_as(run_id: int, node_id: int, task_id: int) -> None:
    """Set the run, node and task that this process' messages name; Flower's runtimes set them once for each process."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def identify(message: Message, message_id: str) -> None:
    """Set a message's id, which its reply will name; Flower sets one only where its own runtime sends the message."""
    message.metadata.__dict__["_message_id"] = message_id
