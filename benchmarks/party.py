"""A server or a client as `fedveil` starts it, which notes when each message passes.

`python -m benchmarks.party NOTES server ...` is `fedveil server ...`, and appends a line for each `Note` to the file
NOTES; `python -m benchmarks.party NOTES client NUMBER ...` likewise.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

PUSHED, CALL, ARRIVED, RECEIVED, TRAINED = "pushed", "call", "arrived", "received", "trained"


@dataclass(frozen=True)
class Note:
    """A note of an event: when, in seconds since the epoch, and of which client, counted from 0 (-1: all).

    what: of the server `pushed` (a round's messages are ready), `arrived` (a client's reply is complete), `call` (a
        client called); of a client `received` (it has a message), `trained` (its reply is ready to be sent)
    """

    when: float
    what: str
    client: int

    def __str__(self) -> str:
        return f"{self.when!r} {self.what} {self.client}"

    @classmethod
    def parse(cls, line: str) -> Note:
        """Read what `str` wrote."""
        when, what, client = line.split()
        return cls(float(when), what, int(client))


def read(path: Path) -> list[Note]:
    """Read all notes of a party."""
    return [Note.parse(line) for line in path.read_text().splitlines()]


def _watch_server(note: Callable[[str, int], None]) -> None:
    from fedveil.server.serving.node_gateway import Node, NodeGateway

    wake, look, hand_on = NodeGateway.wake, NodeGateway._look, NodeGateway._pass

    def noted_wake(self: NodeGateway, node_ids: Iterable[int]) -> None:
        wanted = list(node_ids)
        if wanted:
            note(PUSHED, -1)
        wake(self, wanted)

    def noted_look(self: NodeGateway, node: Node) -> None:
        before = len(self.arrived)
        look(self, node)
        if len(self.arrived) > before:
            note(ARRIVED, _number(node.client))

    async def noted_pass(self: NodeGateway, request: Any) -> Any:
        note(CALL, -1)
        return await hand_on(self, request)

    _put(NodeGateway, wake=noted_wake, _look=noted_look, _pass=noted_pass)


def _watch_client(note: Callable[[str, int], None], client: int) -> None:
    from fedveil.client.node.relay import Relay

    begin, signature = Relay.__init__, inspect.signature(Relay.__init__)

    @wraps(begin)
    def noted_begin(*given: Any, **named: Any) -> None:
        call = signature.bind(*given, **named)
        ask = call.arguments["ask"]

        def noted_ask(request: Any) -> Any:
            note(RECEIVED, client)
            outcome = ask(request)
            note(TRAINED, client)
            return outcome

        call.arguments["ask"] = noted_ask
        begin(*call.args, **call.kwargs)

    _put(Relay, __init__=noted_begin)


def _put(owner: type, **methods: Callable[..., Any]) -> None:
    for name, method in methods.items():
        setattr(owner, name, method)


def _number(client: int | None) -> int:
    return -1 if client is None else client


def main() -> None:
    """Run the party that the command line names; a client's number, from 0, follows `client`."""
    notes, kind = sys.argv[1:3]
    del sys.argv[1]
    with Path(notes).open("a", buffering=1) as file:

        def note(what: str, client: int) -> None:
            file.write(f"{Note(time.time(), what, client)}\n")

        if kind == "server":
            _watch_server(note)
        else:
            _watch_client(note, int(sys.argv.pop(2)))
        from fedveil.cli import main as command_line

        command_line()


if __name__ == "__main__":
    main()
