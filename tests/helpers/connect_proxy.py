"""A small HTTP proxy for tests: it opens tunnels (CONNECT), and prints a line for whatever it is asked.

python connect_proxy.py HOST PORT [deny]
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress


async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await source.read(1 << 16):
            sink.write(part)
            await sink.drain()
    sink.close()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        asked = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode()
    except (asyncio.IncompleteReadError, OSError):  # somebody looked whether it is there
        writer.close()
        return
    print(asked, flush=True)
    method, target, _ = asked.split(" ", 2)
    if method != "CONNECT" or "deny" in sys.argv:
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        writer.close()
        return
    host, _, port = target.rpartition(":")
    try:
        theirs, there = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
        writer.close()
        return
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    await asyncio.gather(copy(reader, there), copy(theirs, writer))


async def main(host: str, port: int) -> None:
    server = await asyncio.start_server(serve, host, port)
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
