"""Updates in the clear: the strategy sees float32 weights of the client's model, whatever travelled, or none of that client."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from helpers.support import CLIENTS, EXAMPLES, GLOBAL, LOCAL, experiment

from fedveil.core.encodings import READERS
from fedveil.core.errors import ProtectionError
from fedveil.core.messages import ARRAYS, METRICS, from_arrays, to_arrays, write_update
from fedveil.server.gathering import Clear
from fedveil.server.strategies import make
from fedveil.simulations.engine.grid import InProcessGrid

TAKES = Array("float32", (4,), "numpy.ndarray", b"\x93NUMPY\x01\x00")


def models(personal: bool) -> list[dict[str, np.ndarray]]:
    return [{name: value + np.float32(k * personal) for name, value in GLOBAL.items()} for k in range(CLIENTS)]


def asked(gathering: Clear, personal: bool) -> list[Message]:
    InProcessGrid(ClientApp(), CLIENTS, {})  # messages can be made where there is a grid
    messages = [
        Message(
            RecordDict({ARRAYS: to_arrays(model), "config": ConfigRecord()}), dst_node_id=k + 1, message_type="train"
        )
        for k, model in enumerate(models(personal))
    ]
    return gathering.ask(messages)


def replies(messages: Iterable[Message], encoding: str, personal: bool) -> list[Message]:
    found = []
    for k, (message, model) in enumerate(zip(messages, models(personal), strict=True)):
        update, _ = write_update(LOCAL[k], model, encoding, None)
        metrics = MetricRecord({"client": k, "num-examples": int(EXAMPLES[k]), "train-loss": 1.0})
        found.append(Message(RecordDict({ARRAYS: update, METRICS: metrics}), reply_to=message))
    return found


@pytest.mark.parametrize("personal", [False, True], ids=["one model", "a model for each client"])
@pytest.mark.parametrize("encoding", READERS)
def test_the_mean_of_what_was_sent_is_the_mean_of_the_weights(encoding, personal) -> None:
    gathering = Clear(make(experiment("fedavg")), encoding)
    arrived = replies(asked(gathering, personal), encoding, personal)
    for k, reply in enumerate(arrived):
        gathering.take(k, reply)
    mean = gathering.finish(1, arrived)
    assert mean is not None
    largest = max(np.abs(LOCAL[k][n] - m[n]).max() for k, m in enumerate(models(personal)) for n in GLOBAL)
    error = {"float32": 1e-6, "float16": 4 * 2.0**-11, "int8": largest / 127 / 2 * 1.001}[encoding]
    for name in GLOBAL:
        wanted = np.average([local[name] for local in LOCAL], axis=0, weights=EXAMPLES)
        assert mean[name].dtype == np.float32
        np.testing.assert_allclose(mean[name], wanted, rtol=0, atol=error)
    assert gathering.sent == {}


@pytest.mark.parametrize("encoding", READERS)
@pytest.mark.parametrize(
    ("update", "said"),
    [
        (None, "its reply has no weights"),
        (MetricRecord({"w": 1.0}), "its reply has no weights"),
        (ArrayRecord(), "'dense.bias' is missing"),
        (ArrayRecord({"dense.weight": TAKES}), "'dense.bias' is missing"),
        (to_arrays({**GLOBAL, "dense.bias": GLOBAL["dense.weight"]}), "its 'dense.(weight|bias)'"),
        (ArrayRecord({"dense.weight": TAKES, "dense.bias": TAKES}), "its 'dense.(weight|bias)'"),
    ],
    ids=["none", "metrics", "empty", "one missing", "another shape", "truncated"],
)
def test_what_is_no_update_is_refused(encoding, update, said) -> None:
    gathering = Clear(make(experiment("fedavg")), encoding)
    reply = replies(asked(gathering, False), encoding, False)[4]
    del reply.content[ARRAYS]
    if update is not None:
        reply.content[ARRAYS] = update
    with pytest.raises(ProtectionError, match=said):
        gathering.take(4, reply)


def test_weights_of_this_process_are_not_copied() -> None:
    gathering = Clear(make(experiment("fedavg")), "float32")
    reply = replies(asked(gathering, False), "float32", False)[2]
    gathering.take(2, reply)
    assert all(from_arrays(reply.content[ARRAYS])[name] is LOCAL[2][name] for name in GLOBAL)
