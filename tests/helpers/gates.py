"""A gateway before a real SuperLink, on a port of loopback, for Flower's own nodes."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import httpx
import uvicorn

from fedveil.core.subprocesses import free_port
from fedveil.server.serving.node_gateway import NodeGateway
from fedveil.server.serving.superlink import SuperLink, start_superlink
from helpers.machines import eventually

SECONDS = 120.0


@contextmanager
def superlink(folder: Path) -> Iterator[SuperLink]:
    """A SuperLink that any node may join; its database and log are in the folder."""
    with tempfile.TemporaryDirectory(prefix="fedveil-") as private:
        link = start_superlink(Path(private) / "superlink", folder / "link.db", False, folder / "superlink.log")
        try:
            yield link
        finally:
            link.child.stop()


@contextmanager
def gate(link: SuperLink) -> Iterator[tuple[str, NodeGateway]]:
    """The address of a gateway before a SuperLink, and the gateway."""
    behind = httpx.AsyncClient(base_url="http://superlink", transport=httpx.AsyncHTTPTransport(uds=str(link.path)))
    gateway = NodeGateway(behind, None, {}, 1 << 20, getLogger("test"), hold=1.0)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(gateway.app, port=port, log_level="error"))
    running = threading.Thread(target=lambda: asyncio.run(server.serve()))
    running.start()
    try:
        eventually(lambda: server.started, SECONDS, "the gateway listens")
        yield f"127.0.0.1:{port}", gateway
    finally:
        server.should_exit = True
        running.join()
