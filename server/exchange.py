"""The exchange of messages and replies: each as it arrives, its bytes and seconds, and the reason of each failure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import WORDS, printable
from fedveil.core.wire.messages import CLIENT, METRICS, wire_bytes

AT_ONCE = 4  # replies that are pulled together, which bounds how many are held
POLL = (0.02, 0.5)  # seconds between pulls: the shortest, and the longest where no reply comes

Row = dict[str, Any]


@runtime_checkable
class AnswersOneByOne(Protocol):
    """A grid that yields each reply as it arrives, with the position of its message."""

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Send messages, and yield their replies for `timeout` seconds."""


@runtime_checkable
class NamesClients(Protocol):
    """A grid whose clients have names."""

    def called(self, client: int) -> str:
        """Return the name of a client for people."""


@dataclass
class Exchanged:
    """The account of the messages of one stage of a round, for the record.

    answered: clients whose replies count
    failures: the reason of each message that has no reply, or none that could be used
    ledger, clients: rows of ledger.csv, one for each message sent, and of clients.csv, one for each reply
    """

    answered: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ledger: list[Row] = field(default_factory=list)
    clients: list[Row] = field(default_factory=list)


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    number: int,
    stage: str,
    timeout: float,
    take: Callable[[int, Message], None] = lambda _client, _reply: None,
    numbers: Sequence[str] = (),
    counts: Mapping[str, int] | None = None,
) -> tuple[Exchanged, list[Message]]:
    """Send messages and wait for the replies; return the account, and the replies in order of their clients.

    timeout: seconds
    take: receives each client and its reply as it arrives, and may remove arrays from it, so that not all are held at
    once; a ProtectionError that it raises makes the reply a failure
    numbers: metrics that a reply must have, beside its client and its seconds
    counts: metrics that must be whole numbers, and the least of each
    Of several replies to one message the first counts; the others are failures.
    Raise what the grid raises.
    """
    weights = {id(m.content): wire_bytes(m.content) for m in messages}
    clients = [m.metadata.dst_node_id - 1 for m in messages]  # node id k+1 is client k
    rows: dict[int, Row] = {
        client: {
            "round": number, "stage": stage, "client": client, "bytes_down": weights[id(message.content)],
            "bytes_up": None, "failure": "no answer in time", "seconds": None,
        }
        for client, message in zip(clients, messages, strict=True)
    }  # fmt: skip
    called = grid.called if isinstance(grid, NamesClients) else "client {}".format  # records count clients from 0
    replies: dict[int, Message] = {}
    answered: set[int] = set()
    again: list[str] = []
    for index, reply in answers(grid, messages, timeout):
        # the message identifies the client, whatever the reply says
        client = clients[index]
        if client in answered:
            again.append(f"{called(client)}: a second reply to one message; the first counts")
            continue
        answered.add(client)
        row = rows[client]
        if reply.has_error():
            row["failure"] = printable(reply.error.reason or "", WORDS) or f"error {reply.error.code}"
            continue
        row["bytes_up"] = wire_bytes(reply.content)
        try:
            seconds = metric(reply, "seconds")
            if not math.isfinite(seconds):
                raise ProtectionError(f"it took {seconds} seconds")
            row["seconds"] = round(seconds, 6)
            if metric(reply, CLIENT) != client:
                raise ProtectionError(f"it calls itself client {metric(reply, CLIENT):g}")
            for key in numbers:
                metric(reply, key)
            for key, least in (counts or {}).items():
                count(reply, key, least)
            take(client, reply)
        except ProtectionError as error:
            row["failure"] = printable(str(error), WORDS)  # it may quote the reply
            continue
        row["failure"] = None
        replies[client] = reply
    order = sorted(replies)  # sums run in a fixed order, not in that of arrival
    ledger = [rows[client] for client in sorted(rows)]
    where = "" if stage == "train" else f", {stage}"
    failures = [f"{called(row['client'])}{where}: {row['failure']}" for row in ledger if row["failure"] is not None]
    return Exchanged(order, failures + again, ledger), [replies[client] for client in order]


def answers(grid: Grid, messages: Sequence[Message], timeout: float | None) -> Iterator[tuple[int, Message]]:
    """Yield replies as they arrive, each with the position of its message in `messages`, for `timeout` seconds.

    One of Flower's own grids is polled.
    """
    if isinstance(grid, AnswersOneByOne):
        yield from grid.answers(messages, timeout)
        return
    waiting = {sent: i for i, sent in enumerate(grid.push_messages(messages))}
    deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
    pause = POLL[0]
    while waiting and time.monotonic() < deadline:
        found = False
        asked = list(waiting)
        for start in range(0, len(asked), AT_ONCE):
            for reply in grid.pull_messages(asked[start : start + AT_ONCE]):
                index = waiting.pop(reply.metadata.reply_to_message_id, None)
                if index is not None:
                    found = True
                    yield index, reply
        pause = POLL[0] if found else min(1.5 * pause, POLL[1])
        if waiting:
            time.sleep(pause)


def metric(reply: Message, key: str) -> float:
    """Return a number among a reply's metrics; raise ProtectionError where it has none by this name."""
    metrics = reply.content.get(METRICS)
    value = metrics.get(key) if isinstance(metrics, MetricRecord) else None
    if not isinstance(value, int | float):
        raise ProtectionError(f"its reply has no number '{key}'")
    return float(cast(float, value))


def count(reply: Message, key: str, least: int = 0) -> int:
    """Return a whole number among a reply's metrics, of at least `least`; raise ProtectionError where it has none."""
    value = metric(reply, key)
    if not value.is_integer() or value < least:
        raise ProtectionError(f"its reply says {key} = {value:g}, where a whole number from {least} belongs")
    return int(value)
