"""Replies are taken as they arrive, a few at a time, from any Flower grid; none outlives its turn."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.core.wire.messages import ARRAYS, to_sealed
from fedveil.server.exchange import AT_ONCE, exchange
from fedveil.simulations.engine.grid import InProcessGrid


class Remote(InProcessGrid):
    """Behaves as Flower's own grid does: all replies are there, and `pull_messages` makes those that are asked for."""

    answers = None  # type: ignore[assignment]

    def __init__(self, clients: int) -> None:
        super().__init__(ClientApp(), clients, {})
        self._updates: list[weakref.ref] = []
        self.most = 0

    def push_messages(self, messages):
        self._sent = {message.metadata.message_id: message for message in self._number(messages)}
        return list(self._sent)

    def pull_messages(self, message_ids):
        for name in message_ids:
            message = self._sent.pop(name)
            metrics = MetricRecord({"client": message.metadata.dst_node_id - 1, "seconds": 0.0})
            reply = Message(RecordDict({ARRAYS: to_sealed(b"x", "bfv"), "metrics": metrics}), reply_to=message)
            self._updates.append(weakref.ref(reply.content[ARRAYS]["sealed"]))
            self.most = max(self.most, sum(update() is not None for update in self._updates))
            yield reply


@pytest.mark.parametrize("clients", [10, 100])
def test_a_server_holds_no_more_updates_when_more_clients_answer(clients) -> None:
    grid, total = Remote(clients), np.zeros(clients)
    content = RecordDict({"config": ConfigRecord()})
    messages = [Message(content, dst_node_id=k + 1, message_type="train") for k in range(clients)]

    def take(client: int, reply: Message) -> None:
        total[client] += len(reply.content.pop(ARRAYS))

    gc.disable()  # what is let go must go by itself
    try:
        exchanged, _ = exchange(grid, messages, 1, "train", 60.0, take)
    finally:
        gc.enable()
    assert exchanged.failures == []
    assert total.tolist() == [1.0] * clients
    assert grid.most <= AT_ONCE + 1
