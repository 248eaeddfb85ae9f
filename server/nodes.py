"""A Flower grid seen as clients 0, 1, 2, ..., whatever nodes there are.

Flower's node ids are random 64-bit numbers, so sampling by position in their list would pick other clients in
every run. The server asks each node once which partition it holds, orders nodes by that, and deals the
clients of the experiment over them: one each where there are as many nodes, several a node where there are
fewer (Flower's simulation starts two unless it is told otherwise).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedveil.core.errors import DeploymentError
from fedveil.core.messages import CLIENT, CONFIG, METRICS
from fedveil.server.exchange import answers


class ClientGrid(Grid):
    """Another grid, where node id k+1 is client k."""

    def __init__(self, grid: Grid, clients: int, timeout: float = 60.0) -> None:
        """Wait for a node (`timeout`: seconds) and ask all; raise DeploymentError where none answers."""
        deadline = time.monotonic() + timeout
        while not (nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
            time.sleep(0.2)
        held = _ask(grid, nodes, timeout)
        if not held:
            raise DeploymentError(f"no client answered within {timeout:g} s ({len(nodes)} nodes connected)")
        ordered = [held[partition] for partition in sorted(held)]
        self._grid, self._clients = grid, clients
        self._nodes = ordered

    def get_node_ids(self) -> Iterable[int]:
        """Node ids 1 to the number of clients."""
        return range(1, self._clients + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send each message to the node that its client was dealt to, naming the client in its config."""
        return self._grid.send_and_receive([self._address(message) for message in messages], timeout=timeout)

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """As `send_and_receive`, each reply as it arrives, with the position of its message."""
        return answers(self._grid, [self._address(message) for message in messages], timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As `send_and_receive` sends them."""
        return self._grid.push_messages([self._address(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid inside does."""
        return self._grid.pull_messages(message_ids)

    def _address(self, message: Message) -> Message:
        client = message.metadata.dst_node_id - 1
        content = RecordDict(dict(message.content))
        config = ConfigRecord(dict(cast(ConfigRecord, content[CONFIG])))
        config[CLIENT] = client
        content[CONFIG] = config
        node = self._nodes[client % len(self._nodes)]
        return Message(content, dst_node_id=node, message_type=message.metadata.message_type)

    def set_run(self, run: Any) -> None:
        """As the grid inside does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the grid inside does."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid inside does."""
        return self._grid.create_message(*args, **kwargs)


def _ask(grid: Grid, nodes: list[int], timeout: float) -> dict[int, int]:
    """Each node's id by the number of the partition it holds."""
    questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    replies = grid.send_and_receive(questions, timeout=timeout) if questions else []
    return {
        int(cast(int, cast(MetricRecord, reply.content[METRICS])[CLIENT])): reply.metadata.src_node_id
        for reply in replies
        if reply.has_content()
    }
