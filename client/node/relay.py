"""The relay between Flower's SuperNode and the trainer: takes messages from one, and has them answered by the other.

The bundle that a server sends is never unpacked or executed: its bytes are compared with those of this FedVeil's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import httpx
from flwr.app import Context, Error, Message

from fedveil.client.flower import NodeRuntime
from fedveil.client.node.trainer import TrainerReply, TrainerRequest, reply_to
from fedveil.core.errors import DeploymentError
from fedveil.core.foreign import WORDS, printable
from fedveil.core.wire.bundle import check_bundle
from fedveil.core.wire.flower import ErrorCode

POLL = (0.05, 0.5)  # seconds between looks for messages: while a run goes on, and when none does
BUSY = 30.0  # seconds after a message in which a run is taken to go on


class Relay:
    """The relay of one SuperNode.

    ask: lets the trainer answer; raises DeploymentError where it died
    tell: receives each reason why this client refused something, once
    """

    def __init__(
        self, address: str, secret: bytes, ask: Callable[[TrainerRequest], TrainerReply], tell: Callable[[str], None]
    ) -> None:
        self._runtime, self._ask, self._tell = NodeRuntime(address, secret), ask, tell
        self._refused: set[str] = set()

    def work(self, going_on: Callable[[], bool]) -> None:
        """Take and answer messages while `going_on()`; a SuperNode that does not answer is asked again."""
        last = 0.0
        with self._runtime:
            while going_on():
                with suppress(httpx.HTTPError):
                    token = self._runtime.acquire()
                    if token is not None:
                        with self._runtime.task(token) as task:
                            context, bundle, message = task.pull()
                            reply = self._answer(context, bundle, message)
                            task.push(reply, context)
                        last = time.monotonic()
                        continue
                time.sleep(POLL[0] if time.monotonic() - last < BUSY else POLL[1])

    def _answer(self, context: Context, bundle: bytes, message: Message) -> Message:
        """Let the trainer answer a message, and put the state to keep into the context."""
        try:
            check_bundle(bundle)
            request = TrainerRequest(message, context.state, dict(context.run_config), context.run_id, context.node_id)
            outcome = self._ask(request)
        except DeploymentError as error:
            self._once(f"refused: {error}")
            return Message(Error(ErrorCode.INVALID_FAB, str(error)), reply_to=message)
        for text in outcome.said or ((outcome.error[1],) if outcome.content is None else ()):
            self._once(text)
        if outcome.did:
            self._tell(outcome.did)
        context.state = outcome.state
        return reply_to(message, outcome)

    def _once(self, why: str) -> None:
        """Tell this client's operator a message, which may quote the server, once, however often it comes."""
        why = printable(why, 2 * WORDS)
        if why not in self._refused:
            self._refused.add(why)
            self._tell(why)
