"""Which connections go through a proxy: TLS to another machine, as the variables say; loopback and plain HTTP never."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from fedveil.core import proxies
from fedveil.core.proxies import proxy_for, spare_loopback, through

NAMES = [name for small in (*proxies.VARIABLES, "no_proxy") for name in (small, small.upper())]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "host", "found"),
    [
        ({}, "server.example", None),
        ({"HTTPS_PROXY": "http://p:3128"}, "server.example", "http://p:3128 (HTTPS_PROXY)"),
        ({"https_proxy": "p:3128"}, "server.example", "http://p:3128 (HTTPS_PROXY)"),
        ({"ALL_PROXY": "http://p"}, "server.example", "http://p:80 (ALL_PROXY)"),
        ({"HTTPS_PROXY": "http://me:secret@p:1", "ALL_PROXY": "http://q:2"}, "10.0.0.7", "http://p:1 (HTTPS_PROXY)"),
        ({"HTTP_PROXY": "http://p:1"}, "server.example", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "server.example"}, "server.example", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".example"}, "server.example", None),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "10.0.0.0/8"}, "10.0.0.7", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, "server.example", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example"}, "server.example", "http://p:1 (HTTPS_PROXY)"),
        *(({"HTTPS_PROXY": "http://p:1"}, host, None) for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1")),
        ({"HTTPS_PROXY": "http://p:1"}, "2001:db8::1", "http://p:1 (HTTPS_PROXY)"),
    ],
)  # fmt: skip
def test_a_proxy_is_found_as_the_variables_say_and_is_named_without_its_password(variables, host, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    proxy = proxy_for(host, 9092)
    assert (proxy and str(proxy)) == found


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9"])
@pytest.mark.parametrize(
    "variables",
    [{"ALL_PROXY": "socks5://p:1"}, {"http_proxy": "http://p:1", "no_proxy": "a.example"}, {"HTTP_PROXY": "p:1"}],
    ids=str,
)
def test_a_client_of_httpx_reaches_loopback_directly_whatever_is_set(url, variables, monkeypatch) -> None:
    """Flower's processes use httpx, which reads these variables itself; with SOCKS it would not even start."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spare_loopback(os.environ)
    spare_loopback(os.environ)  # a process started by one that did this does it again
    with httpx.Client() as client:
        pool = client._transport_for_url(httpx.URL(url))
        assert pool is client._transport
    assert os.environ["NO_PROXY"].count("localhost") == 1
    assert os.environ["NO_PROXY"].startswith(variables.get("no_proxy", ""))


def test_who_spares_all_from_a_proxy_spares_all_afterwards_too(monkeypatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "*")
    assert proxy_for("server.example", 9092) is None
    spare_loopback(os.environ)
    assert proxy_for("server.example", 9092) is None
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL("https://server.example")) is client._transport


def test_a_process_goes_through_the_chosen_proxy_alone(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "http://another:1")
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY")
    chosen = proxy_for("server.example", 9092)
    ask = (
        "import httpx; client = httpx.Client()\n"
        "for url in ('https://s.example', 'http://s.example', 'https://127.0.0.1'):\n"
        "    pool = client._transport_for_url(httpx.URL(url))._pool\n"
        "    print(getattr(pool, '_proxy_url', None) and pool._proxy_url.host.decode())"
    )
    for proxy, wanted in ((chosen, ["another", "None", "None"]), (None, ["None"] * 3)):
        around = {**os.environ, **through(proxy)}
        answer = subprocess.run([sys.executable, "-c", ask], env=around, capture_output=True, text=True, check=True)
        assert answer.stdout.split() == wanted
