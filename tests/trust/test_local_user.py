"""Another user of the server's machine, and a web page in a browser there: neither runs code as the server, or gives orders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from helpers.local_server import LocalServer, as_another_user, call, local_server

from fedveil import Experiment
from fedveil.core.errors import DeploymentError, SettingsError
from fedveil.remote import Server

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
DIGITS = Experiment.preset("digits").override({"data.clients": 3, "federation.cohort": 3})
ORDER = json.dumps({"experiment": DIGITS.toml(), "words": ""}).encode()
EVIL = """
from pathlib import Path
from flwr.serverapp import ServerApp
app = ServerApp()
Path("{loot}").write_text("code of a stranger ran")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(tmp_path_factory.mktemp("local")) as made:
        yield made


@pytest.fixture(scope="module")
def run(server: LocalServer) -> str:
    """A run whose process waits for clients."""
    name = Server(f"localhost:{server.control}").start(DIGITS, lambda _text: None)
    log = server.state / "logs" / f"{name}.log"
    server.waits(lambda: log.exists() and "waiting for clients" in log.read_text(), "the run waits for clients")
    return name


def evil_run(loot: Path) -> bytes:
    """The call that starts a run whose app is the caller's own."""
    project = """
        [project]
        name = "evil"
        version = "1.0.0"
        license = "Apache-2.0"
        [tool.flwr.app]
        publisher = "x"
        [tool.flwr.app.components]
        serverapp = "evil:app"
        clientapp = "evil:app"
        [tool.flwr.app.config]
    """
    files = {"pyproject.toml": project.encode(), "evil.py": EVIL.format(loot=loot).encode()}
    content = "\n".join(f"{name},{hashlib.sha256(part).hexdigest()},{8 * len(part)}" for name, part in files.items())
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, part in {**files, ".info/CONTENT": content.encode()}.items():
            archive.writestr(name, part)
    fab = whole.getvalue()
    request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab))
    return bytes(request.SerializeToString())


def calls_of_flower() -> list[str]:
    """The paths of all interfaces of Flower's SuperLink."""
    from flwr.supercore.routers.runtime import router as runtime
    from flwr.superlink.routers.control import router as control
    from flwr.superlink.routers.fleet.router import router as fleet

    paths = [route.path for part in (runtime, control, fleet) for route in part.routes]  # type: ignore[attr-defined]
    return [*paths, "/docs", "/openapi.json"]


def test_another_user_starts_no_run_and_takes_no_task_on_any_port_or_socket_of_the_server(
    server: LocalServer, run: str, tmp_path: Path
) -> None:
    loot, paths = tmp_path / "loot", calls_of_flower()
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/pull-messages"} <= set(paths)
    body, ports, sockets = evil_run(loot), server.ports, server.paths
    assert {server.port, server.control} <= ports

    def knock() -> list[tuple[int | str, str, int, str]]:
        places = [(port, tls) for port in ports for tls in (False, True)] + [(path, False) for path in sockets]
        return [
            (place, path, *call(place, path, body if path.endswith("start-run") else b"", PROTOBUF, tls=tls))
            for place, tls in places
            for path in (paths if isinstance(place, str) or tls == (place == server.port) else paths[:1])
        ]

    for place, path, status, told in as_another_user(knock):
        assert status in (0, 400, 401, 404), (place, path, status, told)
        assert status or not isinstance(place, str) or "PermissionError" in told, (place, told)
    assert not loot.exists()
    (path,) = sockets  # what refuses a stranger is not simply dead
    assert call(path, "/v1/control/list-nodes", b"", PROTOBUF, tls=False)[0] == 200


def test_another_user_reads_no_secret_of_the_server_or_its_run(server: LocalServer, run: str) -> None:
    secrets = []
    for process in server.processes:
        pairs = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
        secrets += [pair.partition("=")[2] for pair in pairs if pair.startswith("FEDVEIL_") and "TOKEN=" in pair]
    secrets.append(token_of(server))
    files = [*server.state.rglob("*.token"), server.state / "superlink.db", *map(Path, server.paths)]
    told = [path for path in server.state.rglob("*") if path.is_file() and path.suffix in (".log", ".json", ".toml")]

    def look() -> dict[str, bool]:
        lines = "".join(path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline"))
        found = {"a command line": "--token" in lines or any(secret in lines for secret in secrets if secret)}
        for process in server.processes:
            found[f"the environment of {process}"] = os.access(f"/proc/{process}/environ", os.R_OK)
        return found | {str(path): os.access(path, os.R_OK) for path in files}

    seen = as_another_user(look)
    assert not [what for what, readable in seen.items() if readable]
    assert len(list(filter(None, secrets))) == 3, "the run's process has the secret of its task, and its own token"
    for path in told:
        assert not any(secret in path.read_text(errors="replace") for secret in secrets), path


def test_another_user_gives_no_orders(server: LocalServer, run: str) -> None:
    def order() -> list[tuple[int, str]]:
        as_json = {"content-type": "application/json"}
        guess = as_json | {"authorization": "Bearer " + "0" * 64}
        return [
            call(server.control, path, body, headers, tls=False, method=method)
            for headers in (as_json, guess)
            for method, path, body in (
                ("POST", "/runs", ORDER), ("POST", f"/runs/{run}/stop", b"{}"), ("GET", "/status", b""),
                ("GET", f"/runs/{run}/log?offset=0", b""), ("POST", f"/runs/{run}/result", b'{"status": "done", "result": {}}'),
                ("POST", f"/runs/{run}/poll", b"{}"), ("POST", f"/runs/{run}/resume", b"{}"),
            )
        ]  # fmt: skip

    for status, told in as_another_user(order):
        assert status == 401, told
        assert str(server.state / "control.token") in told
        assert "FEDVEIL_TOKEN_FILE" in told

    def type_it() -> str:
        try:
            Server(f"localhost:{server.control}").ask("/status")
        except DeploymentError as error:
            return str(error)
        return "done"

    assert "FEDVEIL_TOKEN_FILE" in as_another_user(type_it)
    assert Server(f"localhost:{server.control}").ask(f"/runs/{run}")["status"] == "running"


def token_of(server: LocalServer) -> str:
    path = server.state / "control.token"
    return path.read_text().strip() if path.exists() else ""


def runs(server: LocalServer) -> list[tuple[str, str]]:
    return [(one["run"], one["status"]) for one in Server(f"localhost:{server.control}").ask("/status")["runs"]]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example", "content-type": "text/plain;charset=UTF-8"}, 403),
        ({"origin": "https://evil.example", "content-type": "application/json"}, 403),
        ({"origin": "null", "content-type": "application/json"}, 403),
        ({"sec-fetch-site": "cross-site", "content-type": "application/json"}, 403),
        ({"host": "evil.example", "content-type": "application/json"}, 400),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json", "content-length": "99999999999"}, 413),
    ],
)
def test_a_web_page_gives_no_orders_even_if_it_knew_the_token(server: LocalServer, headers, status) -> None:
    token = token_of(server)
    before = runs(server)
    given = headers | {"authorization": f"Bearer {token}"}
    assert call(server.control, "/runs", ORDER, given, tls=False)[0] == status
    assert runs(server) == before


def test_a_token_of_a_run_is_good_for_that_run_alone(server: LocalServer, run: str) -> None:
    tokens = []
    for process in server.processes:
        pairs = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
        tokens += [pair.partition("=")[2] for pair in pairs if pair.startswith("FEDVEIL_RUN_TOKEN=")]
    headers = {"content-type": "application/json", "authorization": f"Bearer {tokens[0]}"}
    poll = json.dumps({"wake": [], "waiting": [], "since": 0, "hold": 0}).encode()
    assert call(server.control, f"/runs/{run}/poll", poll, headers, tls=False)[0] == 200
    for path, body in (("/runs", ORDER), ("/runs/another/poll", poll), (f"/runs/{run}/stop", b"{}")):
        assert call(server.control, path, body, headers, tls=False)[0] == 401


def test_the_token_is_found_here_named_elsewhere_and_sent_to_nobody_who_does_not_know_it(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"localhost:{server.control}"
    path = server.state / "control.token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert Server(here).ask("/status")["runs"] is not None
    other = tmp_path / "control.token"
    other.write_text("1" * 64)
    told = Server(here)
    monkeypatch.setattr(told, "_ask", lambda _path: {"token": str(path), "proof": "0" * 64})  # an impostor on the port
    with pytest.raises(DeploymentError, match="does not know this server's token"):
        told.ask("/status")
    monkeypatch.setenv("FEDVEIL_TOKEN_FILE", str(other))
    with pytest.raises(DeploymentError, match="orders need this server's token"):
        Server(here).ask("/status")
    other.write_text(path.read_text())
    assert Server(here).ask("/status")["runs"] is not None
    other.write_text("no token")
    with pytest.raises(SettingsError, match="holds no token"):
        Server(here).ask("/status")
