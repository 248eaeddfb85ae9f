"""Clients that a server must not let in, and servers that a client must not trust: each is told why, in one line."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from deployment.federations import CONTROL, PORT, Federation, federated, new_keys
from helpers.machines import END, Host, Program, eventually, fedveil

from fedveil.client.node import greeting
from fedveil.client.node.greeting import HELLO, Address, greet
from fedveil.core.errors import DeploymentError
from fedveil.core.wire.bundle import ROOMS, code
from fedveil.privacy.trust import certificates
from fedveil.privacy.trust.identity import new_identity
from fedveil.remote import Server

ELSEWHERE = "10.77.0.250"  # an address of the server's that its certificate does not name
PLAIN, IMPOSTOR = 9094, 9095


@dataclass(frozen=True)
class Place:
    """A federation whose server runs with TLS and, on another port, another without; no client has joined."""

    federation: Federation
    plain: Program
    client: Host

    def join(self, folder: Path, *words: str | Path, **environment: str) -> Program:
        """`fedveil client` on the client's machine."""
        return Program(self.client, fedveil("client", "--data", "digits:1/3", *words), folder, "client", **environment)


@pytest.fixture(scope="module")
def place(folder: Path) -> Iterator[Place]:
    with federated(folder) as federation:
        federation.at.add_address(ELSEWHERE)
        server = federation.start_server(wait=False)
        words = ("--insecure", "--port", str(PLAIN), "--control", str(PLAIN + 100), "--state", folder / "plain-state")
        plain = Program(federation.at, fedveil("server", *words), folder, "plain")
        server.says("control ")
        plain.says("control ")
        new_keys(folder / "others", 3, federation.at.address)
        yield Place(federation, plain, federation.hosts[1])
        assert plain.stop() == 0


def refused(program: Program, *words: str, code: int = 1) -> None:
    """Check that a program ended with one message that has these words."""
    assert program.ends() == code, program.said
    lines = [line for line in program.said.splitlines() if line]
    assert lines[0].startswith("error "), program.said
    assert len(lines) == 1, program.said
    for word in words:
        assert word in program.said
    assert "Traceback" not in program.said
    assert "PRIVATE KEY" not in program.said


def test_a_key_that_is_not_registered_is_refused_by_the_server(place: Place, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    shutil.copytree(place.federation.folder / "others" / "client-1", keys)
    shutil.copy(place.federation.keys / "client-1" / "ca.pem", keys)
    program = place.join(tmp_path, "--server", place.federation.address, "--keys", keys)
    refused(program, "refuses this client", "its key is not registered with this server")
    refusals = place.federation.ask("/status")["refused"]
    assert {"client": None, "reason": mock.ANY} in refusals
    assert "not registered" in refusals[-1]["reason"]


def test_a_server_of_another_authority_is_refused_by_the_client(place: Place, tmp_path: Path) -> None:
    keys = place.federation.folder / "others" / "client-1"
    program = place.join(tmp_path, "--server", place.federation.address, "--keys", keys)
    refused(program, "not signed by the authority in this client's ca.pem")


def test_a_plain_client_on_a_tls_port_is_told_to_bring_keys(place: Place, tmp_path: Path) -> None:
    program = place.join(tmp_path, "--server", place.federation.address, "--insecure")
    refused(program, "a server without --insecure speaks TLS: start with --keys DIR")


def test_a_tls_client_on_a_plain_port_is_told_that_the_server_has_no_tls(place: Place, tmp_path: Path) -> None:
    server = f"{place.federation.at.address}:{PLAIN}"
    program = place.join(tmp_path, "--server", server, "--keys", place.federation.keys / "client-1")
    refused(program, "the server does not speak TLS")


def greeted(place: Place, keys: Path, host: str = "", port: int = PORT, ahead: float = 0) -> str:
    """Why a client's greeting fails, on the client's machine, whose clock is some seconds ahead."""
    address = Address(host or place.federation.at.address, port)
    with pytest.raises(DeploymentError) as caught:
        place.client.call(lambda: greet(address, keys, lambda: datetime.now(UTC) + timedelta(seconds=ahead)))
    return str(caught.value)


def test_a_registered_client_is_let_in(place: Place) -> None:
    keys = place.federation.keys / "client-2"
    address = Address(place.federation.at.address, PORT)
    assert place.client.call(lambda: greet(address, keys))["client"] == 1


def test_a_server_of_another_name_is_refused_by_the_client(place: Place) -> None:
    words = greeted(place, place.federation.keys / "client-1", ELSEWHERE)
    assert f"not for the address {ELSEWHERE}" in words


@contextmanager
def impostor(host: Host, folder: Path, made: datetime, host_names: list[str]) -> Iterator[None]:
    """A server of this federation's authority whose certificate was made at another time."""
    operator = folder / "operator"
    key, certificate = certificates.new_certificate(
        (operator / "ca.key").read_bytes(), (operator / "ca.pem").read_bytes(), host_names, made
    )
    place = folder / f"impostor-{made:%Y}"
    place.mkdir()
    for name, content in (("server.key", key), ("server.pem", certificate)):
        (place / name).write_bytes(content)
        (place / name).chmod(0o600)
    words = ["openssl", "s_server", "-quiet", "-accept", str(IMPOSTOR), "-key", place / "server.key"]
    program = Program(host, [*words, "-cert", place / "server.pem"], folder, f"impostor-{made:%Y}")
    try:
        eventually(lambda: IMPOSTOR in {port for _, port in host.listening}, END, "the impostor listens")
        yield
    finally:
        program.process.terminate()
        program.process.wait()


@pytest.mark.parametrize(
    ("days", "words"),
    [(-500, "certificate has expired"), (+30, "certificate is not valid yet")],
    ids=["past", "future"],
)
def test_a_certificate_out_of_its_time_is_refused_by_the_client(place: Place, days: int, words: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("NOT TESTED: needs openssl for a server with an expired certificate")
    made = datetime.now(UTC) + timedelta(days=days)
    with impostor(place.federation.at, place.federation.keys, made, [place.federation.at.address]):
        assert words in greeted(place, place.federation.keys / "client-1", port=IMPOSTOR)


@pytest.mark.parametrize(("seconds", "words"), [(600, "ahead of"), (-600, "behind")], ids=["ahead", "behind"])
def test_a_clock_ten_minutes_off_is_named_by_the_server(place: Place, seconds: int, words: str) -> None:
    told = greeted(place, place.federation.keys / "client-1", ahead=seconds)
    assert f"its clock is {abs(seconds)} s {words} the server's" in told
    assert "set the clocks" in told


def test_a_signature_of_another_key_is_refused(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    right, other = (greeting._signed(place.federation.keys / f"client-{k}" / "identity.key", now) for k in (1, 2))
    mixed = {**right, greeting.FLEET_HTTP_SIGNATURE_HEADER: other[greeting.FLEET_HTTP_SIGNATURE_HEADER]}
    monkeypatch.setattr(greeting, "_signed", lambda _identity, _now: mixed)
    assert "its signature is not by the key that it names" in greeted(place, place.federation.keys / "client-1")


def another(folder: Path, version: str = "") -> str:
    """A folder for PYTHONPATH with another FedVeil: one comment more, and another version where one is given."""
    for room in ("", *(f".{room}" for room in (*ROOMS, "simulations"))):
        here = find_spec(f"fedveil{room}")
        assert here is not None
        assert here.origin is not None
        place = folder / "fedveil" / room[1:]
        shutil.copytree(
            Path(here.origin).parent, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    with (folder / "fedveil" / "client" / "work.py").open("a") as file:
        file.write("# another\n")
    if version:
        about = folder / f"fedveil-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fedveil\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize("number", ["", "9.8.7"], ids=["code", "version"])
def test_a_client_of_another_fedveil_is_refused_before_it_joins_with_both_named(
    place: Place, tmp_path: Path, number: str
) -> None:
    path = another(tmp_path / "another", number)
    words = ("--server", place.federation.address, "--keys", place.federation.keys / "client-1")
    program = place.join(tmp_path, *words, PYTHONPATH=path)
    here = version("fedveil")
    refused(program, f"the server runs FedVeil {here} (code {code()[:12]}), and this client {number or here} (code ")
    assert program.said.count(code()[:12]) == 1


# --- a stranger on the network, who has a key that nobody registered, or none

STRANGE = (
    "/", "/health", "/status", "/runs", "/runs/digits/stop", "/docs", "/openapi.json", "/metrics", "/v1", "/v1/", "/v1/fleet",
    "/v1/fleet/", "/v1/fleet/none", "/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol%2flist-nodes", "/v1/fleet/pull-messages/../../control/list-nodes", "//v1/control/list-nodes",
    "/v1//control/list-nodes", "/V1/CONTROL/list-nodes", "/v1/control/list-nodes?/v1/fleet/pull-messages",
    "/v1/fleet/pull-messages%00", "http://127.0.0.1:9093/status", "/flwr.proto.Control/ListNodes",
)  # fmt: skip
METHODS = ("GET", "POST", "OPTIONS")


def of_flower() -> list[str]:
    """Every path that Flower's programs know."""
    import flwr

    sources = Path(flwr.__file__).parent.rglob("*.py")
    found = {path for source in sources for path in re.findall(r'"(/v1/[a-z/-]+)"', source.read_text("utf-8"))}
    return sorted(found)


def call(place: Place, method: str, path: str, headers: dict[str, str], port: int = PORT) -> tuple[int, bytes]:
    """One call over TLS with a path as it is written."""
    trust = ssl.create_default_context(cafile=str(place.federation.keys / "client-1" / "ca.pem"))
    line = HTTPSConnection(place.federation.at.address, port, timeout=END, context=trust)
    with closing(line):
        line.putrequest(method, path, skip_host=True)
        for name, value in {"Host": "server", "Content-Length": "0", **headers}.items():
            line.putheader(name, value)
        line.endheaders()
        answer = line.getresponse()
        return answer.status, answer.read()


def stranger_s(folder: Path) -> dict[str, str]:
    """Headers signed with a key of the right kind that its owner made himself."""
    private, _ = new_identity()
    (folder / "identity.key").write_bytes(private)
    return greeting._signed(folder / "identity.key", datetime.now(UTC))


def test_a_stranger_gets_nothing_from_any_path_of_the_server_s_port(place: Place, tmp_path: Path) -> None:
    paths = [*of_flower(), HELLO, *STRANGE]
    assert {"/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/acquire-task"} <= set(paths)
    stranger = place.federation.hosts[2]

    def knock() -> list[tuple[str, str, int, bytes]]:
        return [
            (method, path, *call(place, method, path, headers))
            for headers in ({}, stranger_s(tmp_path))
            for path in paths
            for method in METHODS
        ]

    for method, path, status, body in stranger.call(knock):
        assert status in (400, 401, 404), (method, path, status, body)
        if status != 400:
            assert set(json.loads(body)) == {"error"}, (method, path, body)


def test_a_registered_client_gets_nothing_but_the_node_part(place: Place) -> None:
    others = [path for path in [*of_flower(), *STRANGE] if not path.startswith("/v1/fleet/")]
    key = place.federation.keys / "client-1" / "identity.key"

    def knock() -> set[tuple[str, int]]:
        return {(path, call(place, "POST", path, greeting._signed(key, datetime.now(UTC)))[0]) for path in others}

    assert {status for _, status in place.client.call(knock)} <= {400, 404}


def test_nothing_of_a_server_but_its_port_can_be_reached_from_another_machine(place: Place) -> None:
    server, stranger = place.federation.at, place.federation.hosts[2]
    local = {"127.0.0.1", "00000000000000000000000001000000"}
    assert {port for address, port in server.listening if address not in local} == {PORT, PLAIN}
    inside = {port for address, port in server.listening if address in local}
    assert inside == {CONTROL, PLAIN + 100}  # Flower's SuperLinks listen on no port

    def knock(port: int) -> int:
        with socket.socket() as line:
            line.settimeout(END)
            return line.connect_ex((server.address, port))

    assert stranger.call(lambda: {knock(port) for port in inside}) == {errno.ECONNREFUSED}
    assert stranger.call(lambda: knock(PORT)) == 0
    assert server.call(lambda: Server("localhost").ask("/health"))["status"] == "ok"
    with pytest.raises(DeploymentError, match="no server answers there"):
        stranger.call(lambda: Server(f"{server.address}:{CONTROL}").ask("/health"))


def test_a_stranger_who_writes_no_http_or_none_at_all_does_not_keep_the_server_from_clients(place: Place) -> None:
    server, stranger = place.federation.at, place.federation.hosts[2]

    def connect(words: bytes) -> socket.socket:
        line = socket.create_connection((server.address, PORT), timeout=END)
        line.sendall(words)
        return line

    lines = stranger.call(lambda: [connect(words) for words in 50 * (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n")])
    try:
        address = Address(server.address, PORT)
        keys = place.federation.keys / "client-2"
        assert place.client.call(lambda: greet(address, keys))["client"] == 1
    finally:
        for line in lines:
            line.close()
