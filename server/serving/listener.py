"""The server's ports: how many connections each party may hold, and how long each may take to ask for something.

A connection belongs to its address until it has shown whose it is. Where an address holds too many, or all strangers
together do, the oldest of them ends: a new one is always let in, so strangers that hold on to theirs lock nobody out.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

EACH = 64  # connections of one address or one client; a client's machine holds two or three
STRANGERS = 512  # connections of all that have not shown whose they are
HANDSHAKE = 10.0  # seconds of a TLS handshake
HEAD = 10.0  # seconds from there, or from an answer, until a request's headers are whole
PAUSE = 60.0  # seconds between parts of a request's body
BACKLOG = 1024  # connections that the system keeps until they are let in
CLOSING = 5  # seconds that open calls have to end
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Peer = tuple[str, int]


def network(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 that a machine with IPv6 chooses its addresses in."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Connection:
    """A connection of a port. end: closes it at once; holder: whose it is"""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.holder: Hashable = ("address", network(peer[0]))
        self.end: Callable[[], object] = lambda: None


class Door:
    """The connections of a port by who holds them, the oldest first.

    each: the most of one holder; strangers: the most of all that have not shown whose they are
    ended: how many were ended because there were too many
    """

    def __init__(self, log: Logger, each: int = EACH, strangers: int = STRANGERS) -> None:
        self._log, self._each, self._most = log, each, strangers
        self._held: dict[Hashable, dict[Connection, None]] = defaultdict(dict)
        self._strangers: dict[Connection, None] = {}
        self._at: dict[Peer, Connection] = {}
        self.ended = 0

    def admit(self, connection: Connection) -> None:
        """Take in a new connection; where there are too many, end older ones."""
        self._at[connection.peer] = connection
        self._strangers[connection] = None
        self._hold(connection)
        if len(self._strangers) > self._most:
            self.end_oldest()

    def vouch(self, peer: Peer | None, who: Hashable) -> None:
        """Note that the connection from `peer` is of a party that has shown who it is."""
        connection = None if peer is None else self._at.get((peer[0], peer[1]))
        if connection is None or connection.holder == ("party", who):
            return
        self._let_go(connection)
        connection.holder = ("party", who)
        self._hold(connection)

    def leave(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._let_go(connection)
        if self._at.get(connection.peer) is connection:
            del self._at[connection.peer]

    def end_oldest(self) -> None:
        """End the oldest connection of a stranger."""
        if self._strangers:
            self._end(next(iter(self._strangers)))

    def _hold(self, connection: Connection) -> None:
        held = self._held[connection.holder]
        held[connection] = None
        if len(held) > self._each:
            self._end(next(iter(held)))

    def _let_go(self, connection: Connection) -> None:
        self._strangers.pop(connection, None)
        held = self._held[connection.holder]
        held.pop(connection, None)
        if not held:
            del self._held[connection.holder]

    def _end(self, connection: Connection) -> None:
        self.ended += 1
        if self.ended == 1 or self.ended % 1000 == 0:  # strangers must not fill the disk
            self._log.info("ended a connection from %s: too many are open (%d so far)", connection.peer[0], self.ended)
        self.leave(connection)
        connection.end()


class Listener(uvicorn.Server):
    """Uvicorn behind a door, without its own signal handlers, because the supervisor ends it.

    certificate, key: files of TLS; None for plain HTTP
    """

    def __init__(
        self, app: Starlette, host: str, port: int, door: Door, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Timed,
                ws="none",
                ssl_certfile=certificate,
                ssl_keyfile=key,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,  # saves bytes: small updates are hardly larger than their headers
                lifespan="off",
                proxy_headers=False,  # a header must not choose the address that is counted
                timeout_graceful_shutdown=CLOSING,
            )
        )
        self._address, self._door = (host, port), door
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and let connections in."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listening = socket.create_server(self._address, family=family, backlog=BACKLOG)
        listening.setblocking(False)
        await super().startup([])
        self._run(self._accept(listening))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody in any more, and end as Uvicorn does."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().shutdown(sockets)

    def _run(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        with listening:
            while True:
                try:
                    accepted, peer = await asyncio.get_running_loop().sock_accept(listening)
                except OSError as error:  # it was gone before it was let in, or nothing is left to let it in with
                    if error.errno in _EXHAUSTED:
                        self._door.end_oldest()
                        await asyncio.sleep(0.05)
                    continue
                connection = Connection((str(peer[0]), int(peer[1])))
                entering = self._run(self._let_in(accepted, connection))
                entering.add_done_callback(partial(self._left_outside, accepted, connection))
                connection.end = entering.cancel
                self._door.admit(connection)
                await asyncio.sleep(0)  # however many come, those that are in have their turn

    async def _let_in(self, accepted: socket.socket, connection: Connection) -> None:
        """Shake hands, where there is TLS, and hand the connection to Uvicorn."""
        protocol = _Timed(self.config, self.server_state, self.lifespan.state)
        protocol.left = lambda: self._door.leave(connection)
        tls = self.config.ssl
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, accepted, ssl=tls, ssl_handshake_timeout=HANDSHAKE if tls else None
            )
        except OSError:  # TLS' errors and a handshake that takes too long are of this kind too
            self._door.leave(connection)
            accepted.close()
        else:
            connection.end = transport.abort

    def _left_outside(self, accepted: socket.socket, connection: Connection, entering: asyncio.Task[None]) -> None:
        if entering.cancelled():  # maybe before it began
            self._door.leave(connection)
            accepted.close()


class _Timed(H11Protocol):
    """HTTP/1.1 whose requests must come in time; h11 bounds the size of their headers."""

    def __init__(self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.left: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._within(HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave."""
        self._within(None)
        self.left()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come; expect the rest of a body, and no rest of headers later than it was expected."""
        super().data_received(data)
        if self._asking:
            self._within(PAUSE if self.cycle.more_body else None)

    def on_response_complete(self) -> None:
        """Expect the next request."""
        super().on_response_complete()
        if not self._asking:
            self._within(HEAD)

    @property
    def _asking(self) -> bool:
        """Whether there is a request that has no whole answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _within(self, seconds: float | None) -> None:
        """End the connection after so many seconds, unless this is called again before."""
        if self._timer is not None:
            self._timer.cancel()
        ends = seconds is not None and not self.transport.is_closing()
        self._timer = self.loop.call_later(seconds, self.transport.abort) if ends and seconds is not None else None
