"""A Flower grid inside this process: messages go to a `ClientApp` by a call, one client after another.

No Ray, no SuperLink, no sockets; the client app and the strategy cannot tell the difference. Node k+1 holds
partition k, so ids and order are the same in every run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedveil.core.errors import FedveilError, Interrupted, TrainingError

RUN_ID = 1


class InProcessGrid(Grid):
    """Runs a client app for `clients` nodes, one message after another, in the order they are sent."""

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        run_config: dict[str, Any],
        *,
        stop: Callable[[], bool] = lambda: False,
        watch: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """`stop` is asked before each message; `watch` is told how many of the messages at hand are done."""
        # Flower's messages read who sends them from here; its own runtimes set it once a process
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 0, 1
        self._app, self._clients, self._config = app, clients, run_config
        self._stop, self._watch = stop, watch
        self._states: dict[int, RecordDict] = {}  # of the clients that keep any
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def get_node_ids(self) -> Iterable[int]:
        """Node ids, by partition."""
        return range(1, self._clients + 1)

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run in this process."""

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
        """Run the clients at once; their replies wait to be pulled."""
        ids: list[str] = []
        for reply in self.send_and_receive(messages):
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to pushed messages, each given once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the client of each message; raise Interrupted when asked to stop, TrainingError when a client fails."""
        messages = list(messages)
        replies: list[Message] = []
        for message in messages:
            if self._stop():
                raise Interrupted("stopped")
            replies.append(self._run_client(message))
            self._watch(len(replies), len(messages))
        return replies

    def _run_client(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self._clients},
            state=self._states.get(node, RecordDict()),
            run_config=self._config,
        )
        try:
            reply = self._app(message, context)
        except FedveilError:
            raise
        except Exception as error:
            # in one process a client's exception is a mistake in the experiment, not a fault of a machine
            raise TrainingError(f"client {node - 1} failed: {type(error).__name__}: {error}{_where(error)}") from error
        if context.state:
            self._states[node] = context.state
        return reply


def _where(error: Exception) -> str:
    """The last line of code outside installed packages: most often the user's own network."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
