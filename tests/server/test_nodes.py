"""Clients are dealt over whatever nodes there are, by the partition each holds, not by Flower's random ids."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.core.errors import DeploymentError
from fedveil.server.nodes import ClientGrid
from fedveil.simulations.engine.grid import InProcessGrid


class RandomIds(InProcessGrid):
    """A grid whose nodes have other ids than their partitions, in another order, as Flower's have."""

    ids = (9001, 17, 555)

    def __init__(self, answering: bool = True) -> None:
        app = ClientApp()

        @app.query()
        def query(message, context):
            partition = context.node_config["partition-id"] if answering else 1 // 0
            return Message(RecordDict({"metrics": MetricRecord({"client": partition})}), reply_to=message)

        @app.train()
        def train(message, context):
            answer = {"node": context.node_config["partition-id"], "asked": message.content["config"]["client"]}
            return Message(RecordDict({"metrics": MetricRecord(answer)}), reply_to=message)

        super().__init__(app, 3, {})

    def get_node_ids(self):
        return list(self.ids)

    def send_and_receive(self, messages, *, timeout=None):
        partitions = dict(zip(self.ids, (2, 0, 1), strict=True))
        for message in messages:
            message.metadata.dst_node_id = partitions[message.metadata.dst_node_id] + 1
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for reply in replies:
            back = {partition + 1: node for node, partition in partitions.items()}
            reply.metadata.__dict__["_src_node_id"] = back[reply.metadata.src_node_id]
        return replies


def ask(grid: ClientGrid, clients) -> list[tuple[int, int]]:
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, dst_node_id=client + 1, message_type="train") for client in clients]
    replies = grid.send_and_receive(messages)
    return [(r.content["metrics"]["asked"], r.content["metrics"]["node"]) for r in replies]


def test_as_many_nodes_as_clients_get_their_own_partition() -> None:
    grid = ClientGrid(RandomIds(), 3)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert ask(grid, (2, 0, 1)) == [(2, 2), (0, 0), (1, 1)]


def test_fewer_nodes_stand_for_several_clients_each() -> None:
    grid = ClientGrid(RandomIds(), 7)
    assert list(grid.get_node_ids()) == list(range(1, 8))
    assert ask(grid, range(7)) == [(k, k % 3) for k in range(7)]


def test_no_node_is_an_error_that_says_how_long_it_waited() -> None:
    class Empty(RandomIds):
        ids = ()

    with pytest.raises(DeploymentError, match=r"no client answered within 0.1 s \(0 nodes connected\)"):
        ClientGrid(Empty(), 3, timeout=0.1)
