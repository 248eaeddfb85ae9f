"""A stranger opens more connections than the server may have files, and says little on them or nothing: clients are let in."""

from __future__ import annotations

import resource
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.local_server import LocalServer, local_server

from fedveil.client.node.greeting import Address, greet

FILES, CONNECTIONS = 1024, 1100
HALF = b"POST /v1/fedveil/hello HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * CONNECTIONS:
        pytest.skip(f"NOT TESTED: a process may open {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CONNECTIONS), hard))
    with local_server(tmp_path_factory.mktemp("idle"), FILES) as made:
        yield made
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def hold(server: LocalServer, kind: str, address: str) -> list[socket.socket]:
    """Connections that a stranger keeps open: silent, or with half a request in TLS."""
    loose = ssl.create_default_context()
    loose.check_hostname, loose.verify_mode = False, ssl.CERT_NONE
    held: list[socket.socket] = []
    begin = time.monotonic()
    for _ in range(CONNECTIONS):
        assert time.monotonic() - begin < 60, f"the server answers no stranger after {len(held)} connections"
        line = socket.create_connection(("127.0.0.1", server.port), timeout=5, source_address=(address, 0))
        if kind == "half a request":
            try:
                line = loose.wrap_socket(line)
                line.sendall(HALF)
            except OSError:  # ended already, as too many were open
                continue
        held.append(line)
    return held


@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.1"], ids=["of its own", "of the client"])
@pytest.mark.parametrize("kind", ["nothing", "half a request"])
def test_a_registered_client_is_answered_whatever_a_stranger_holds(
    server: LocalServer, kind: str, address: str
) -> None:
    keys, at = server.keys / "client-1", Address("localhost", server.port)
    held = hold(server, kind, address)
    try:
        for _ in range(3):
            begin = time.monotonic()
            assert greet(at, keys)["client"] == 0
            assert time.monotonic() - begin < 10
        open_files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        assert open_files < 200, "the server does not hold what a stranger holds"
    finally:
        for line in held:
            line.close()
    log = (server.state / "logs" / "gateway.log").read_text()
    assert "too many are open" in log
    assert len(log.splitlines()) < 100
