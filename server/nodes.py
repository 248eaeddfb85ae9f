"""A Flower grid seen as clients 0, 1, 2, ..., whatever its nodes are.

Flower's node ids are random 64-bit numbers, so sampling by position in their list would draw other clients in every
run.
The server asks each node once for the number of its partition, orders nodes by it, and assigns the clients of the
experiment to them: one each where there are as many nodes, several a node where there are fewer (Flower's simulation
starts two unless it is told otherwise).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedveil.core.errors import DeploymentError
from fedveil.core.wire.messages import CLIENT, CONFIG, METRICS
from fedveil.server.exchange import answers


class WrappedGrid(Grid):
    """A grid around another, the inner grid. A subclass defines the nodes and the addresses of messages."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def _addressed(self, message: Message) -> Message:
        """Return the message as the inner grid is to send it."""
        return message

    def get_node_ids(self) -> Iterable[int]:
        """Return the inner grid's node ids."""
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send each message to where it is addressed, and wait for the replies (`timeout`: seconds)."""
        return self._grid.send_and_receive([self._addressed(message) for message in messages], timeout=timeout)

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Yield replies as they arrive, each with the position of its message, for `timeout` seconds."""
        return answers(self._grid, [self._addressed(message) for message in messages], timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send each message to its address, and return the ids of the messages."""
        return self._grid.push_messages([self._addressed(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived at the inner grid."""
        return self._grid.pull_messages(message_ids)

    def set_run(self, run: Any) -> None:
        """Set the inner grid's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The inner grid's run."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message with the inner grid."""
        return self._grid.create_message(*args, **kwargs)


class ClientGrid(WrappedGrid):
    """A grid around another, where node id k+1 is client k."""

    def __init__(self, grid: Grid, clients: int, timeout: float = 60.0) -> None:
        """Wait for a node (`timeout`: seconds) and ask all for their partitions.

        Raise DeploymentError where none answers.
        """
        super().__init__(grid)
        deadline = time.monotonic() + timeout
        while not (nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
            time.sleep(0.2)
        held = _ask(grid, nodes, timeout)
        if not held:
            raise DeploymentError(f"no client answered within {timeout:g} s ({len(nodes)} nodes connected)")
        self._clients, self._nodes = clients, [held[partition] for partition in sorted(held)]

    def get_node_ids(self) -> Iterable[int]:
        """Return node ids 1 to the number of clients."""
        return range(1, self._clients + 1)

    def _addressed(self, message: Message) -> Message:
        return addressed(message, self._nodes[(message.metadata.dst_node_id - 1) % len(self._nodes)])


def addressed(message: Message, node: int) -> Message:
    """Return a message to client k, addressed as node k+1, as one to node `node`, whose config names client k."""
    content = RecordDict(dict(message.content))
    config = ConfigRecord(dict(cast(ConfigRecord, content[CONFIG])))
    config[CLIENT] = message.metadata.dst_node_id - 1
    content[CONFIG] = config
    return Message(content, dst_node_id=node, message_type=message.metadata.message_type)


def _ask(grid: Grid, nodes: list[int], timeout: float) -> dict[int, int]:
    """Return each node's id by the number of its partition."""
    questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    replies = grid.send_and_receive(questions, timeout=timeout) if questions else []
    return {
        int(cast(int, cast(MetricRecord, reply.content[METRICS])[CLIENT])): reply.metadata.src_node_id
        for reply in replies
        if reply.has_content()
    }
