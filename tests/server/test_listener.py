"""The server's ports: what is too slow is ended, what is too many ends the oldest, and who is known keeps its place."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedveil.core.settings.sections import Privacy
from fedveil.core.subprocesses import free_port
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import new_parties
from fedveil.server.serving import listener as room
from fedveil.server.serving.listener import Connection, Door, Listener, network

SHORT, LONG = 0.4, 1.5  # seconds: what a test allows, and what is longer for sure
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDSHAKE", "HEAD", "PAUSE"):
        monkeypatch.setattr(room, name, SHORT)


def serving(
    steps: Callable[[int, Door], Awaitable[None]], each: int = 64, strangers: int = 512, keys: Path | None = None
) -> None:
    """Take steps at the port of a server whose app vouches at /known, is slow at /slow, and reads all at /body."""
    door, port = Door(getLogger("test"), each, strangers), free_port()

    async def answer(request: Request) -> Response:
        if request.url.path == "/known":
            door.vouch((request.client.host, request.client.port) if request.client else None, "a client")
        if request.url.path == "/slow":
            await asyncio.sleep(LONG)
        await request.body()
        return PlainTextResponse("here")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])

    async def main() -> None:
        tls = () if keys is None else (keys / "server.pem", keys / "server.key")
        server = Listener(app, "127.0.0.1", port, door, *tls)
        task = asyncio.create_task(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(steps(port, door), 30)
        finally:
            server.should_exit = True
            await task
        assert not door._at, "connections are forgotten when they end"
        assert not door._held
        assert not door._strangers

    asyncio.run(main())


async def connect(port: int, words: bytes = b"", **options: Any) -> Line:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    writer.write(words)
    return reader, writer


async def ended(line: Line, seconds: float = LONG) -> bool:
    """Whether the other side ends a connection within this time."""
    try:
        while await asyncio.wait_for(line[0].read(1000), seconds):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


async def answered(line: Line, words: bytes = GET) -> bool:
    try:
        line[1].write(words)
        return b"here" in await asyncio.wait_for(line[0].readuntil(b"here"), 5)
    except (ConnectionError, asyncio.IncompleteReadError):
        return False


@pytest.mark.parametrize("words", [b"", GET[:-4], b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"])
def test_what_asks_for_nothing_in_time_is_ended(impatient: None, words: bytes) -> None:
    async def steps(port: int, _: Door) -> None:
        assert await ended(await connect(port, words))

    serving(steps)


def test_a_drip_of_headers_gains_no_time_and_the_second_request_has_no_more_than_the_first(impatient: None) -> None:
    async def steps(port: int, _: Door) -> None:
        line = await connect(port)
        assert await answered(line)

        async def drip() -> None:
            line[1].write(b"GET / HTTP/1.1\r\n")
            for _ in range(40):
                await asyncio.sleep(SHORT / 8)
                line[1].write(b"a: b\r\n")

        dripping = asyncio.create_task(drip())
        assert await ended(line)
        dripping.cancel()

    serving(steps)


def test_headers_without_end_are_refused_before_they_fill_the_memory() -> None:
    async def steps(port: int, _: Door) -> None:
        line = await connect(port, b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 1_000_000)
        assert await ended(line)

    serving(steps)


def test_an_answer_may_take_long_and_so_may_a_body_that_goes_on(impatient: None) -> None:
    async def steps(port: int, _: Door) -> None:
        slow = asyncio.create_task(answered(await connect(port), b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n"))
        line = await connect(port, b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n")
        for _ in range(7):
            await asyncio.sleep(SHORT / 2)
            line[1].write(b"x")
        assert await answered(line, b"x")
        assert await slow

    serving(steps)


def test_a_handshake_that_never_ends_is_ended(impatient: None, tmp_path: Path) -> None:
    write_keys(tmp_path, None, 3, new_parties(3, Privacy(), ["localhost"]))

    async def steps(port: int, door: Door) -> None:
        silent = await connect(port)
        garbage = await connect(port, b"\x16\x03\x01\x02\x00")
        assert await ended(silent)
        assert await ended(garbage)
        trusted = ssl.create_default_context(cafile=str(tmp_path / "server" / "ca.pem"))
        line = await connect(port, ssl=trusted, server_hostname="localhost")
        assert await answered(line)
        assert len(door._at) == 1
        line[1].close()
        await asyncio.sleep(0.1)

    serving(steps, keys=tmp_path / "server")


def test_the_oldest_of_too_many_strangers_ends_and_who_is_known_stays() -> None:
    async def steps(port: int, door: Door) -> None:
        known = await connect(port)
        assert await answered(known, b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
        strangers = [await connect(port) for _ in range(20)]
        assert [await ended(line, 0.05) for line in strangers] == [True] * 16 + [False] * 4
        assert await answered(known)
        late = await connect(port)  # behind the same address as all of them
        assert await answered(late, b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
        assert door.ended == 17

    serving(steps, each=4)


def test_all_strangers_together_are_bounded_whatever_their_addresses() -> None:
    async def steps(port: int, door: Door) -> None:
        lines = [await connect(port, local_addr=(f"127.0.0.{2 + number}", 0)) for number in range(10)]
        assert [await ended(line, 0.05) for line in lines] == [True] * 4 + [False] * 6

    serving(steps, strangers=6)


def test_a_client_that_is_known_holds_no_more_than_its_share() -> None:
    ended: list[int] = []
    door = Door(getLogger("test"), each=3)
    for number in range(5):
        connection = Connection(("10.0.0.1", number))
        connection.end = lambda number=number: ended.append(number)  # type: ignore[misc]
        door.admit(connection)
        door.vouch(connection.peer, "a client")
        door.vouch(connection.peer, "a client")
    assert ended == [0, 1]
    door.vouch(("10.0.0.1", 99), "a client")  # has ended already
    door.vouch(None, "a client")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False), ("192.0.2.1", "::ffff:192.0.2.1", True), ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:0:ffff::1", True), ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True), ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)  # fmt: skip
def test_addresses_of_one_machine_count_as_one(one: str, other: str, same: bool) -> None:
    assert (network(one) == network(other)) == same


def test_a_server_without_file_descriptors_ends_a_stranger_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(port: int, door: Door) -> None:
        stranger = await connect(port)
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        accept = loop.sock_accept
        failures = iter([OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")])

        async def failing(listening: socket.socket) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return await accept(listening)

        monkeypatch.setattr(loop, "sock_accept", failing)
        assert await answered(await connect(port))
        assert await answered(await connect(port))
        assert await ended(stranger, 5)
        assert await answered(await connect(port))

    serving(steps)
