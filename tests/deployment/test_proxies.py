"""A client behind a proxy: it goes through it by TLS or says which one failed; nothing else ever does."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import JOINED, PORT, Federation, federated, new_keys
from helpers import connect_proxy
from helpers.machines import START, Program, eventually, fedveil

OPEN, CLOSED = 3128, 3129
NOWHERE = "http://10.77.0.254:1"  # whoever asks this one gets no answer
RUN = {"data.clients": 1, "federation.cohort": 1, "federation.rounds": 2, "training.epochs": 1}


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    """A server, and on the machine of the second client nothing but two proxies, one of which lets nobody through."""
    with federated(folder, clients=2) as made:
        shutil.rmtree(made.keys)
        new_keys(made.keys, 1, made.at.address)  # for the one client: more than half of all must sign a run's manifest
        at = made.hosts[2]
        started = []
        for port, words in ((OPEN, ()), (CLOSED, ("deny",))):
            line = [sys.executable, connect_proxy.__file__, at.address, str(port), *words]
            started.append(Program(at, line, folder, f"proxy-{port}"))
            started[-1].says("listening")
        around = {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "ALL_PROXY": "socks5://10.77.0.254:1"}
        made.start_server(**around)
        yield made
        for program in started:
            program.process.kill()
            program.process.wait()


def proxy(federation: Federation, port: int = OPEN) -> str:
    return f"http://{federation.hosts[2].address}:{port}"


def asked(federation: Federation, port: int = OPEN) -> list[str]:
    """What the proxy was asked for."""
    return (federation.folder / f"proxy-{port}.out").read_text().splitlines()[1:]


def test_a_client_trains_through_the_proxy_of_https_proxy_and_asks_it_for_tunnels_alone(federation: Federation) -> None:
    around = {"HTTPS_PROXY": proxy(federation), "HTTP_PROXY": NOWHERE, "ALL_PROXY": "socks5://10.77.0.254:1"}
    client = federation.start_client(1, "digits:1/1", **around)
    federation.connected(1)
    assert f"through the proxy {proxy(federation)} (HTTPS_PROXY)" in client.said
    run = federation.order(RUN)
    run.ends()
    assert run.clients(2) == [1]
    (seen,) = federation.ask("/status")["clients"]
    assert seen["address"] == federation.hosts[2].address  # all that the server saw came from the proxy
    assert len(asked(federation)) >= 2  # the greeting, and Flower's SuperNode
    assert {re.sub(" HTTP/1.*", "", line) for line in asked(federation)} == {f"CONNECT {federation.address}"}
    assert client.stop() == 0


def test_a_client_goes_around_the_proxy_where_no_proxy_names_the_server(federation: Federation) -> None:
    before = len(asked(federation))
    host = federation.address.partition(":")[0]
    client = federation.start_client(1, "digits:1/1", HTTPS_PROXY=proxy(federation), NO_PROXY=host)
    federation.connected(1)
    federation.order(RUN).ends()
    (seen,) = federation.ask("/status")["clients"]
    assert seen["address"] == federation.hosts[1].address
    assert len(asked(federation)) == before
    assert client.stop() == 0


@pytest.mark.parametrize(
    ("way", "ends", "words"),
    [
        (f"http://PROXY:{CLOSED}", True, ["makes no connection to it (403 Forbidden)", "let it pass CONNECT to"]),
        ("http://me:secret@PROXY:1", False, ["http://PROXY:1 (HTTPS_PROXY) cannot be reached", "NO_PROXY="]),
        ("socks5://PROXY:1080", True, ["socks5://PROXY:1080 (HTTPS_PROXY) is none that can be used"]),
    ],
)
def test_the_proxy_that_failed_is_named(federation: Federation, tmp_path: Path, way, ends, words) -> None:
    at = federation.hosts[2].address
    keys = federation.keys / "client-1"
    line = fedveil("client", "--server", federation.address, "--keys", keys, "--data", "digits:1/1")
    program = Program(federation.hosts[1], line, tmp_path, "client", HTTPS_PROXY=way.replace("PROXY", at))
    if ends:
        assert program.ends() == 1
    for word in words:
        program.says(word.replace("PROXY:", f"{at}:"))
    assert "secret" not in program.said
    assert "Traceback" not in program.said
    if not ends:
        assert program.stop() == 0


def test_plain_http_goes_through_no_proxy(federation: Federation, tmp_path: Path) -> None:
    words = ("--insecure", "--port", str(PORT + 2), "--control", str(PORT + 102), "--state", tmp_path / "plain-state")
    server = Program(federation.at, fedveil("server", *words), tmp_path, "plain", HTTP_PROXY=NOWHERE)
    server.says("control ")
    before = len(asked(federation))
    address = f"{federation.at.address}:{PORT + 2}"
    line = fedveil("client", "--server", address, "--insecure", "--data", "digits:1/1", "--state", tmp_path / "state")
    around = {name: proxy(federation) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy")}
    client = Program(federation.hosts[1], line, tmp_path, "client", **around)
    client.says("joined")
    state = tmp_path / "state" / "supernode.log"
    eventually(lambda: state.exists() and JOINED in state.read_text(), START, "the plain client is connected")
    assert len(asked(federation)) == before
    assert client.stop() == 0
    assert server.stop() == 0
