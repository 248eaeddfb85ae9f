"""A TCP relay that counts the bytes that pass in both directions, and when."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from types import TracebackType

PIECE = 1 << 16  # bytes at most that are relayed at once


class Meter:
    """A port on loopback, open inside `with`, whose connections are relayed to another port.

    It counts what TCP carries: TLS and all within, without the headers of TCP and IP.
    """

    def __init__(self, to: int) -> None:
        self.port = 0
        self._to = to
        self._passed: list[tuple[float, int, int, int]] = []  # when; bytes up, bytes down, connections
        self._passing: set[asyncio.Task[None] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        self._open.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def between(self, begin: float, end: float) -> tuple[int, int, int]:
        """Return bytes up, bytes down and new connections between two moments, in seconds since the epoch."""
        found = [entry[1:] for entry in list(self._passed) if begin <= entry[0] < end]
        up, down, opened = (sum(column) for column in zip((0, 0, 0), *found, strict=True))
        return up, down, opened

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._pass, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._open.set()
        self._loop.run_forever()
        server.close()
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until both ends are closed."""
        this = asyncio.current_task()
        self._passing.add(this)  # the event loop keeps no reference to a task
        try:
            await self._connect(reader, writer)
        finally:
            self._passing.discard(this)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._passed.append((time.time(), 0, 0, 1))
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry(reader, back, True), self._carry(there, writer, False))
        writer.close()
        back.close()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: bool) -> None:
        # a broken connection has ended, as a closed one has
        with suppress(ConnectionError):
            while piece := await source.read(PIECE):
                size = len(piece)
                self._passed.append((time.time(), size if up else 0, 0 if up else size, 0))
                sink.write(piece)
                await sink.drain()
        with suppress(OSError):
            sink.write_eof()
