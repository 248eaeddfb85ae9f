"""A Flower grid inside this process: messages go to a `ClientApp` by a call, one client after another.

No Ray, no SuperLink, no sockets; the client app and the strategy cannot tell the difference. Node k+1 holds
partition k, so ids and order are the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedveil.core.errors import FedveilError, Interrupted, TrainingError
from fedveil.core.places import where
from fedveil.core.wire.flower import act_as, identify
from fedveil.simulations.flower import Run

RUN_ID = 1


class InProcessGrid(Grid):
    """A grid that runs a client app for `clients` nodes, one message after another, in the order they are sent."""

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        run_config: dict[str, Any],
        *,
        stop: Callable[[], bool] = lambda: False,
        watch: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """`stop`: asked before each message; `watch`: called with the number of messages that are done, and of all."""
        act_as(RUN_ID, 0, 1)
        self._app, self._clients, self._config = app, clients, run_config
        self._stop, self._watch = stop, watch
        self._states: dict[int, RecordDict] = {}  # by node, of the clients that keep any
        self._replies: dict[str, Message] = {}
        self._numbers = count(1)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids by partition."""
        return range(1, self._clients + 1)

    def set_run(self, run: Run) -> None:
        """Do nothing, as this process has one run."""

    @property
    def run(self) -> Run:
        """The one run of this process."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message as Flower does."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients of the messages, keep the replies to be pulled, and return the messages' ids."""
        sent = list(messages)
        for message, reply in zip(sent, self.send_and_receive(sent), strict=True):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the client of each message, and return the replies in order.

        Raise Interrupted when asked to stop, TrainingError when a client fails.
        """
        sent = list(messages)
        replies = dict(self.answers(sent, timeout))
        return [replies[i] for i in range(len(sent))]

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Yield what `send_and_receive` returns, one reply after another, each with the position of its message."""
        sent = self._number(messages)
        for i, message in enumerate(sent):
            if self._stop():
                raise Interrupted("stopped")
            yield i, self._run_client(message)
            self._watch(i + 1, len(sent))

    def _number(self, messages: Iterable[Message]) -> list[Message]:
        """Give each message an id, which its reply will name, as Flower does when a message is sent."""
        sent = list(messages)
        for message in sent:
            identify(message, str(next(self._numbers)))
        return sent

    def _context(self, node: int) -> Context:
        """Return the context that the client of a node is given with a message."""
        return Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self._clients},
            state=self._states.get(node, RecordDict()),
            run_config=self._config,
        )

    def _run_client(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self._context(node)
        try:
            reply = self._app(message, context)
        except FedveilError:
            raise
        except Exception as error:
            # in one process a client's exception is a mistake in the experiment, not a fault of a machine
            raise TrainingError(f"client {node - 1} failed: {type(error).__name__}: {error}{where(error)}") from error
        if context.state:
            self._states[node] = context.state
        return reply
