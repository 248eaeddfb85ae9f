"""Updates in the clear: an algorithm sees float32 weights of the client's model, whatever travelled, or none of that client."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from helpers.support import CLIENTS, EXAMPLES, GLOBAL, LOCAL

from fedveil.algorithms.fedavg import weighted_mean
from fedveil.core.errors import ProtectionError
from fedveil.core.wire.encodings import READERS
from fedveil.core.wire.messages import ARRAYS, METRICS, from_arrays, to_arrays, write_update
from fedveil.server.protection.plain import PlainCollector
from fedveil.simulations.engine.grid import InProcessGrid

TAKES = Array("float32", (4,), "numpy.ndarray", b"\x93NUMPY\x01\x00")


def models(personal: bool) -> list[dict[str, np.ndarray]]:
    return [{name: value + np.float32(k * personal) for name, value in GLOBAL.items()} for k in range(CLIENTS)]


def asked(collector: PlainCollector, personal: bool) -> list[Message]:
    InProcessGrid(ClientApp(), CLIENTS, {})  # messages can be made where there is a grid
    messages = [
        Message(
            RecordDict({ARRAYS: to_arrays(model), "config": ConfigRecord()}), dst_node_id=k + 1, message_type="train"
        )
        for k, model in enumerate(models(personal))
    ]
    return collector.ask(messages)


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
    collector = PlainCollector(encoding)
    arrived = replies(asked(collector, personal), encoding, personal)
    for k, reply in enumerate(arrived):
        collector.take(k, reply)
    found = collector.finish(arrived).contributions
    assert [one.client for one in found] == list(range(CLIENTS))
    mean = weighted_mean([one.weights for one in found], [one.examples for one in found])
    largest = max(np.abs(LOCAL[k][n] - m[n]).max() for k, m in enumerate(models(personal)) for n in GLOBAL)
    error = {"float32": 1e-6, "float16": 4 * 2.0**-11, "int8": largest / 127 / 2 * 1.001}[encoding]
    for name in GLOBAL:
        wanted = np.average([local[name] for local in LOCAL], axis=0, weights=EXAMPLES)
        assert mean[name].dtype == np.float32
        np.testing.assert_allclose(mean[name], wanted, rtol=0, atol=error)
    assert collector.sent == {}


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
    collector = PlainCollector(encoding)
    reply = replies(asked(collector, False), encoding, False)[4]
    del reply.content[ARRAYS]
    if update is not None:
        reply.content[ARRAYS] = update
    with pytest.raises(ProtectionError, match=said):
        collector.take(4, reply)


def test_weights_of_this_process_are_not_copied() -> None:
    collector = PlainCollector("float32")
    reply = replies(asked(collector, False), "float32", False)[2]
    collector.take(2, reply)
    assert all(from_arrays(reply.content[ARRAYS])[name] is LOCAL[2][name] for name in GLOBAL)
