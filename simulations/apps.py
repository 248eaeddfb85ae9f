"""Any Flower app, run unmodified in this process, without Ray and without a SuperLink."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedveil.core.errors import FedveilError, Interrupted, SettingsError
from fedveil.core.randomness import Stream, global_random, torch_random
from fedveil.core.wire.flower import ErrorCode, act_as
from fedveil.core.wire.messages import wire_bytes
from fedveil.server.summary import megabytes
from fedveil.simulations.app_folder import (
    AppFolder,
    Scalar,
    find_clients,
    importable,
    load,
    override,
    read_app,
    reason,
)  # fmt: skip
from fedveil.simulations.engine.grid import RUN_ID, InProcessGrid
from fedveil.simulations.flower import MANAGER, SERVER
from fedveil.simulations.generators import Parties

CALLS = 5  # of `get_node_ids` by an app that only waits, after which it waits for nodes in vain
PATIENCE = 5.0  # seconds that it must have waited by then
BUSY = 0.2  # share of a processor's time above which it works


class AppGrid(InProcessGrid):
    """A grid that runs an app's clients as Flower's runtimes do: on copies, with an error as the reply to a failure.

    messages: how many were sent; failures: how many were answered by an error
    bytes_down, bytes_up: bytes of the contents of messages and of replies
    """

    def __init__(self, app: ClientApp, clients: int, config: dict[str, Scalar], folder: Path, parties: Parties) -> None:
        """`folder`: of the app, whose lines errors name; `parties`: the generators of each client."""
        super().__init__(app, clients, config)
        act_as(RUN_ID, SERVER, 1)
        self.messages = self.failures = self.bytes_down = self.bytes_up = 0
        self.in_vain: FedveilError | None = None
        self._folder, self._parties = folder, parties
        self._server = threading.get_ident()  # the thread that runs the app's server, where it is the one that waits
        self._asked: dict[str, int] = {}  # messages by kind; in `_failed`, those that failed
        self._failed: dict[str, int] = {}
        self._took: dict[str, float] = {}  # seconds that a message's client worked
        self._waiting = _Waiting()
        self._turn = Lock()  # Flower's older strategies send from several threads

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids by partition; raise FedveilError where the app waits for more nodes in vain."""
        here = threading.get_ident() == self._server
        # Flower's older interface asks on a thread of its own, every five seconds, also while its server works
        if (here or _waits_in_manager(self._server)) and self._waiting.in_vain(CALLS if here else 1):
            self.in_vain = FedveilError(
                f"the app's server waits for more clients, and there are {self._clients}; give it more with --clients, or lower "
                "the least number that its strategy asks for"
            )
            if here:
                raise self.in_vain
            if self._server == threading.main_thread().ident:
                # it waits for a day, and nothing else wakes it; a job in the background may ignore SIGINT
                signal.pthread_kill(self._server, signal.SIGUSR1)
        return super().get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the client of each message; return the replies in order, without those that took longer than `timeout`.

        timeout: seconds; clients work one after another, and each is given its own time, as if all worked at once
        """
        sent = list(messages)
        replies = [reply for _, reply in self.answers(sent)]
        took = [self._took.pop(message.metadata.message_id) for message in sent]
        if timeout is None:
            return replies
        return [reply for reply, seconds in zip(replies, took, strict=True) if seconds <= timeout]

    def lost(self) -> str | None:
        """Return a kind of message that every client answered by an error; None where there is none."""
        return next((kind for kind, asked in self._asked.items() if self._failed.get(kind) == asked), None)

    def _run_client(self, message: Message) -> Message:
        kind = message.metadata.message_type
        with self._turn:
            self._asked[kind] = self._asked.get(kind, 0) + 1
            self.messages += 1
            self.bytes_down += wire_bytes(message.content)
            started = time.monotonic()
            with self._parties.client(message.metadata.dst_node_id):
                reply = self._answer(message)
            self._took[message.metadata.message_id] = time.monotonic() - started
            self._waiting = _Waiting()
            if reply.has_error():
                self.failures += 1
                self._failed[kind] = self._failed.get(kind, 0) + 1
                client = message.metadata.dst_node_id - 1
                print(f"client {client} failed: {reply.error.reason}", file=sys.stderr, flush=True)
            else:
                self.bytes_up += wire_bytes(reply.content)
            return reply

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if not 1 <= node <= self._clients:
            known = f"there is no node {node}; the nodes are 1 to {self._clients}"
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, known), reply_to=message)
        # copies, as sending makes them: a client changes only its copy, and a failed client keeps its old state
        context = deepcopy(self._context(node))
        try:
            reply = self._app(deepcopy(message), context)
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned a {type(reply).__name__}, not a Message")
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("the client app returned a Message that is no reply to its own; make it with reply_to")
        except (Exception, SystemExit) as error:
            why = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason(error, self._folder))
            return Message(why, reply_to=message)
        self._states[node] = context.state
        return deepcopy(reply)


def run_app(
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    clients: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Run the Flower app in a folder to its end; return what `fedveil app ... --json` prints.

    settings: other values for keys of the app's run config
    clients: their number; without it that of the app's or the user's Flower configuration, else 10
    seed: of Python's, NumPy's and PyTorch's global generators while the app runs; they are left alone without it
    Raises SettingsError before any of the app's server code runs; FedveilError where that code fails or all replies to
    one kind of message are errors; Interrupted on Ctrl-C.
    """
    app = read_app(Path(folder))
    config = override(app, settings or {})
    count = find_clients(app, clients)
    started = time.perf_counter()
    try:
        with _seeded(seed), importable(app.folder):
            parties = Parties(seed)
            with parties.importing(app.server.partition(":")[0], server=True):
                server = load(app, app.server, ServerApp)
            with parties.importing(app.client.partition(":")[0], server=False):
                client = load(app, app.client, ClientApp)
            grid = AppGrid(client, count, config, app.folder, parties)
            _serve(app, server, grid, config)
        if kind := grid.lost():
            raise FedveilError(f"no client answered a '{kind}' message without an error; the reasons are above")
    except KeyboardInterrupt:
        raise Interrupted("what the app wrote is kept; the run of an app cannot be resumed") from None
    return {
        "app": str(app.folder),
        "clients": count,
        "seed": seed,
        "messages": grid.messages,
        "failures": grid.failures,
        "seconds": round(time.perf_counter() - started, 3),
        "bytes_up": grid.bytes_up,
        "bytes_down": grid.bytes_down,
    }


def _serve(app: AppFolder, server: ServerApp, grid: AppGrid, config: dict[str, Scalar]) -> None:
    """Run the app's server to its end."""
    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    try:
        with _woken():
            server(grid, context)
    except KeyboardInterrupt:
        if grid.in_vain is None:
            raise
    except SystemExit as error:
        if error.code not in (None, 0):
            raise FedveilError(f"the app's server ended with exit code {error.code}") from error
    except Exception as error:
        if error is not grid.in_vain:
            raise FedveilError(f"the app's server failed: {reason(error, app.folder)}") from error
    if grid.in_vain is not None:
        raise grid.in_vain


@contextmanager
def _woken() -> Iterator[None]:
    """Let SIGUSR1 raise KeyboardInterrupt in the main thread within the block, by which `AppGrid` ends a wait in vain."""
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class _Waiting:
    """Calls of `get_node_ids` since the last message, by a server that does nothing else."""

    def __init__(self) -> None:
        self.calls, self._since, self._worked = 0, 0.0, 0.0

    def in_vain(self, calls: int) -> bool:
        """Count a call; say whether there were as many before it, for long enough, and no work between them."""
        now, worked = time.monotonic(), time.process_time()
        if not self.calls or worked - self._worked > BUSY * (
            now - self._since
        ):  # an evaluation on the server, most often
            self.calls, self._since, self._worked = 0, now, worked
        self.calls += 1
        return self.calls > calls and now - self._since > PATIENCE


def _waits_in_manager(thread: int) -> bool:
    """Say whether a thread waits for clients in the client manager of Flower's older interface."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "wait_for" and frame.f_globals.get("__name__") == MANAGER:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed the global generators within the block; do nothing without a seed."""
    if seed is None:
        yield
        return
    if not 0 <= seed < 2**63:
        raise SettingsError(f"seed = {seed}: must be a whole number from 0 to 2^63 - 1")
    with global_random(Stream(seed), "app"), torch_random(Stream(seed), "app", cuda=torch.cuda.is_available()):
        yield


def summary_text(summary: Mapping[str, Any]) -> str:
    """Describe the run of an app for people."""
    failed = f", {summary['failures']:,} failed" if summary["failures"] else ""
    return (
        f"done     {summary['messages']:,} messages to {summary['clients']:,} clients in {summary['seconds']:.1f} s{failed}\n"
        f"traffic  {megabytes(summary['bytes_up'])} up, {megabytes(summary['bytes_down'])} down"
    )
