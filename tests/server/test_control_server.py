"""The control server: orders are kept, followed and gone on with; the SuperLink and the runs' processes are fakes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedveil.core.errors import DeploymentError
from fedveil.core.settings.experiment import Experiment
from fedveil.server.serving import control_server as room
from fedveil.server.serving.control_server import DONE, FAILED, RUNNING, STOPPED, ControlServer
from fedveil.server.serving.node_gateway import Node, NodeGateway
from fedveil.server.serving.superlink import start_superlink

ORDER = {"experiment": Experiment.preset("digits").toml(), "words": ""}


class Flower:
    """What the SuperLink was asked, and how it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[tuple[dict[str, str], int]] = []
        self.stopped: list[int] = []
        self.over: dict[int, str] = {}
        self.broken = ""
        monkeypatch.setattr(room, "start_run", self.start)
        monkeypatch.setattr(room, "stop_run", lambda _link, run: self.stopped.append(run))
        monkeypatch.setattr(room, "ended", lambda _link, run: self.over.get(run))
        monkeypatch.setattr(room, "online", lambda _link: {101})
        monkeypatch.setattr(room, "take", lambda _link, run: f"task of {run}")
        monkeypatch.setattr(room, "start_process", self.start_process)
        self.processes: list[dict[str, str]] = []

    def start(self, _link: Any, settings: dict[str, str], series: int = 0) -> tuple[int, int]:
        if self.broken:
            raise DeploymentError(self.broken)
        self.started.append((settings, series))
        return 1000 + len(self.started), series or 77

    def start_process(self, _link: Any, _name: str, secrets: dict[str, str], _log: Path) -> Any:
        self.processes.append(secrets)
        return SimpleNamespace(running=True)


@pytest.fixture
def flower(monkeypatch) -> Flower:
    return Flower(monkeypatch)


def at(
    state: Path, finish: Callable[[Path], None] = lambda _folder: None, **limits: float
) -> tuple[ControlServer, NodeGateway]:
    """A control server on a state folder."""
    gateway = NodeGateway(None, {}, {}, 1, getLogger("test"))  # type: ignore[arg-type]
    link: Any = SimpleNamespace(child=SimpleNamespace(running=True))
    return ControlServer(
        state, None, link, gateway, {101: 0}, "http://127.0.0.1:9093", finish, getLogger("test"), **limits
    ), gateway


def asking(control: ControlServer, *calls: tuple[str, str, Any]) -> list[tuple[int, Any]]:
    """Answers to calls of (method, path, body), one after another."""

    async def ask() -> list[tuple[int, Any]]:
        transport = httpx.ASGITransport(control.app)
        async with httpx.AsyncClient(base_url="http://localhost:9093", transport=transport) as client:
            answers = [
                await client.request(method, path, json=body, headers=bearer(control, path))
                for method, path, body in calls
            ]
        return [(answer.status_code, answer.json()) for answer in answers]

    return asyncio.run(ask())


def bearer(control: ControlServer, path: str) -> dict[str, str]:
    """What who may ask for a path sends with it: a run's process its own token, the operator the server's."""
    run = path.split("/")[2] if path.endswith(("/poll", "/result")) else ""
    return {"authorization": f"Bearer {control._tokens[run] if run else control._token}"}


def ordered(control: ControlServer) -> str:
    """The name of a new run."""
    ((status, told),) = asking(control, ("POST", "/runs", ORDER))
    assert status == 200
    return str(told["run"])


def test_a_run_is_started_with_all_that_its_process_needs(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    ((settings, series),) = flower.started
    assert series == 0
    assert Experiment.parse(settings["experiment"]) == Experiment.preset("digits")
    assert settings["record"] == str(tmp_path / "runs" / run)
    assert settings["control"] == f"http://127.0.0.1:9093/runs/{run}"
    assert settings["resume"] == ""
    assert asking(control, ("GET", f"/runs/{run}", None))[0][1]["status"] == RUNNING
    assert ordered(control) != run  # in the same second too


def test_a_desk_on_the_same_state_goes_on_with_what_was_running_in_the_same_series(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run, done = ordered(control), ordered(control)
    asking(control, ("POST", f"/runs/{done}/result", {"status": DONE, "result": {"rounds": 3}}))
    (tmp_path / "runs" / run).mkdir(parents=True)
    (tmp_path / "runs" / run / "experiment.toml").touch()  # its record was complete when the desk ended
    later, _ = at(tmp_path)
    asyncio.run(later.go_on())
    assert flower.stopped == [1001]
    settings, series = flower.started[-1]
    assert (settings["resume"], series) == ("yes", 77)
    assert settings["record"].endswith(run)
    assert len(flower.started) == 3
    assert asking(later, ("GET", f"/runs/{done}", None))[0][1]["result"] == {"rounds": 3}


def test_an_order_is_kept_before_it_starts(flower, tmp_path, monkeypatch) -> None:
    kept: list[dict[str, Any]] = []
    start = flower.start

    def killed(*given: Any) -> tuple[int, int]:
        kept.extend(json.loads(path.read_text()) for path in (tmp_path / "orders").glob("*.json"))
        return start(*given)

    monkeypatch.setattr(room, "start_run", killed)
    control, _ = at(tmp_path)
    run = ordered(control)
    assert [order["run"] for order in kept] == [run]
    assert kept[0]["status"] == RUNNING


def test_a_run_that_the_superlink_refuses_has_failed_and_says_why(flower, tmp_path) -> None:
    flower.broken = "Flower's SuperLink refused the run: no"
    control, _ = at(tmp_path)
    ((status, told),) = asking(control, ("POST", "/runs", ORDER))
    assert (status, told["error"]) == (409, flower.broken)
    ((_, whole),) = asking(control, ("GET", "/status", None))
    assert [one["status"] for one in whole["runs"]] == [FAILED]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"experiment": "[training]\nepochs = 0\n"}, "training.epochs"),
        ({"experiment": "no = toml"}, "not valid TOML"),
        ({"experiment": "digit"}, "did you mean 'digits'?"),
        ({"experiment": "a = " + "[" * 100_000}, "in one another too deeply"),
    ],
    ids=["setting", "toml", "preset", "deep"],
)
def test_bad_settings_are_refused_and_nothing_is_kept(flower, tmp_path, body, said) -> None:
    control, _ = at(tmp_path)
    ((status, told),) = asking(control, ("POST", "/runs", body))
    assert (status, told["exit_code"]) == (400, 2)
    assert said in told["error"]
    assert flower.started == []
    assert not list(tmp_path.glob("orders/*"))


def test_the_status_says_how_far_a_run_is_and_the_index_what_to_ask_for(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    ((_, told),) = asking(control, ("GET", "/status", None))
    assert told["runs"][0] | {"seconds": 0} == {
        "run": run, "status": RUNNING, "round": 0, "rounds": 20, "scores": {}, "seconds": 0,
    }  # fmt: skip
    (tmp_path / "runs" / run).mkdir(parents=True)
    (tmp_path / "runs" / run / "metrics.csv").write_text("round,train_loss,test_accuracy\n0,,0.1\n1,0.5,0.75\n")
    ((_, told), (status, index)) = asking(control, ("GET", "/status", None), ("GET", "/", None))
    assert (told["runs"][0]["round"], told["runs"][0]["scores"]) == (1, {"train_loss": 0.5, "test_accuracy": 0.75})
    assert status == 200
    assert "/status" in index["paths"]


def test_an_order_that_no_client_could_fulfil_is_refused_and_nothing_is_kept(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    control._keys = tmp_path  # its one registered client
    ((status, told),) = asking(control, ("POST", "/runs", ORDER))
    assert (status, told["exit_code"]) == (400, 2)
    assert "this federation has 1 registered clients" in told["error"]
    assert flower.started == []
    assert not list(tmp_path.glob("orders/*"))


@pytest.mark.parametrize("body", [[1], {}, "text", 0])
def test_an_order_that_cannot_be_read_is_refused(flower, tmp_path, body) -> None:
    control, _ = at(tmp_path)
    ((status, told),) = asking(control, ("POST", "/runs", body))
    assert (status, "cannot be read" in told.get("error", "")) == (400, True)
    assert flower.started == []


def test_a_run_whose_process_ends_without_a_word_has_failed(flower, tmp_path) -> None:
    control, _ = at(tmp_path, look=0.01, wordless=0.05)
    run, told = ordered(control), ordered(control)
    flower.over = {1001: "failed: killed", 1002: "completed"}
    asking(control, ("POST", f"/runs/{told}/result", {"status": DONE, "result": {}}))

    async def watch() -> None:
        watching = asyncio.create_task(control.watch())
        while control._orders[run].status == RUNNING:
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(asyncio.wait_for(watch(), 20))
    assert control._orders[run].status == FAILED
    assert "ended without a word (failed: killed)" in control._orders[run].result["error"]
    assert control._orders[told].status == DONE


def test_a_stop_reaches_the_runs_process_and_the_run_can_go_on(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    poll = {"wake": [], "waiting": [], "since": 0, "hold": 0}
    assert asking(control, ("POST", f"/runs/{run}/poll", poll))[0][1]["stop"] is False
    asking(control, ("POST", f"/runs/{run}/stop", {}))
    assert asking(control, ("POST", f"/runs/{run}/poll", poll))[0][1]["stop"] is True
    asking(control, ("POST", f"/runs/{run}/result", {"status": STOPPED, "result": {"error": "stopped"}}))
    status, told = asking(control, ("POST", f"/runs/{run}/stop", {}))[0]
    assert (status, told["error"]) == (409, f"{run} is not running: it is stopped")
    assert asking(control, ("POST", f"/runs/{run}/resume", {}))[0] == (200, {"run": run})
    assert asking(control, ("POST", f"/runs/{run}/poll", poll))[0][1]["stop"] is False
    assert "is running already" in asking(control, ("POST", f"/runs/{run}/resume", {}))[0][1]["error"]


def test_a_poll_tells_what_arrived_once_and_what_was_refused_since(flower, tmp_path) -> None:
    control, gateway = at(tmp_path)
    run = ordered(control)
    gateway.arrived = {"m1": None, "other": None}
    gateway.refused.extend([(4, 0, "too large"), (5, None, "not signed")])
    gateway._nodes[b"key"] = Node(0, node_id=101, starts=3)
    poll = {"wake": ["101"], "waiting": ["m1", "m2"], "since": 4, "hold": 0}
    told = asking(control, ("POST", f"/runs/{run}/poll", poll))[0][1]
    assert told["arrived"] == ["m1"]
    assert (told["refused"], told["since"]) == ([[None, "not signed"]], 5)
    assert told["starts"] == {"101": 3}
    assert told["clients"] == {"101": 0}
    assert gateway._nodes[b"key"].work.is_set()
    assert gateway.arrived == {"other": None}
    assert asking(control, ("POST", f"/runs/{run}/poll", poll))[0][1]["arrived"] == []


@pytest.mark.parametrize(
    ("ago", "heard", "back", "silent", "deaf"),
    [(31, 1, 0, True, False), (29, 1, 0, False, False), (100, 20, 0, False, True), (100, 1, 10, False, False)],
)
def test_a_client_is_silent_only_while_others_are_heard(flower, tmp_path, ago, heard, back, silent, deaf) -> None:
    control, gateway = at(tmp_path)
    run = ordered(control)
    now = time.time()
    gateway._nodes[b"key"] = Node(0, node_id=102, seen=now - ago)
    gateway.heard, gateway.back = now - heard, now - back if back else 0.0
    told = asking(control, ("POST", f"/runs/{run}/poll", {"wake": [], "waiting": [], "since": 0, "hold": 0}))[0][1]
    assert (told["silent"], told["deaf"]) == (["102"] if silent else [], deaf)
    assert ("102" in told["online"]) == (deaf or bool(back))  # what Flower says of it counts again later


def test_a_poll_waits_for_a_reply(flower, tmp_path) -> None:
    control, gateway = at(tmp_path)
    run = ordered(control)

    async def wait() -> list[str]:
        transport = httpx.ASGITransport(control.app)
        async with httpx.AsyncClient(base_url="http://localhost", transport=transport) as client:
            body = {"wake": [], "waiting": ["m1"], "since": 0, "hold": 2}
            path = f"/runs/{run}/poll"
            asked = asyncio.create_task(client.post(path, json=body, headers=bearer(control, path)))
            await asyncio.sleep(0.05)
            assert not asked.done()
            gateway.arrived["m1"] = None
            gateway.arrival.set()
            return (await asked).json()["arrived"]

    assert asyncio.run(wait()) == ["m1"]


def test_the_log_is_told_from_where_it_was_left_in_whole_lines(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    (tmp_path / "logs").mkdir()
    path = control.log_path(run)
    path.write_text("one\ntwo\nthr")
    told = asking(control, ("GET", f"/runs/{run}/log?offset=0", None))[0][1]
    assert told == {"text": "one\ntwo\n", "offset": 8}
    path.write_text("one\ntwo\nthree\n")
    assert asking(control, ("GET", f"/runs/{run}/log?offset=8", None))[0][1] == {"text": "three\n", "offset": 14}
    assert asking(control, ("GET", f"/runs/{run}/log", None))[0][1] == {"text": "", "offset": 14}


def test_pictures_are_drawn_of_what_is_done_and_their_failure_loses_nothing(flower, tmp_path) -> None:
    drawn: list[Path] = []

    def finish(folder: Path) -> None:
        drawn.append(folder)
        raise DeploymentError("no font")

    control, _ = at(tmp_path, finish)
    run = ordered(control)
    control.record(run).mkdir(parents=True)
    asking(control, ("POST", f"/runs/{run}/result", {"status": DONE, "result": {"rounds": 1}}))
    assert drawn == [control.record(run)]
    assert asking(control, ("GET", f"/runs/{run}", None))[0][1]["status"] == DONE


def test_a_page_in_a_browser_under_another_name_gives_no_orders(flower, tmp_path) -> None:
    control, _ = at(tmp_path)

    async def ask() -> int:
        transport = httpx.ASGITransport(control.app)
        async with httpx.AsyncClient(base_url="http://evil.example", transport=transport) as client:
            return (await client.post("/runs", json=ORDER)).status_code

    assert asyncio.run(ask()) == 400
    assert flower.started == []


def told_to(
    control: ControlServer, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, Any]:
    """The answer to a call with these headers and no others of ours."""

    async def ask() -> tuple[int, Any]:
        transport = httpx.ASGITransport(control.app)
        async with httpx.AsyncClient(base_url="http://localhost:9093", transport=transport) as client:
            answer = await client.request(method, path, headers=headers, content=body)
        return answer.status_code, answer.json()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x", "Bearer é"]
)
def test_who_has_no_token_is_told_where_it_is_and_nothing_else(flower, tmp_path, given) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    headers = {"authorization": given.format(token=control._token).encode()} if given else {}
    for method, path in (
        ("GET", "/status"),
        ("GET", f"/runs/{run}"),
        ("GET", "/nothing"),
        ("POST", f"/runs/{run}/stop"),
    ):
        status, told = told_to(control, method, path, headers)  # type: ignore[arg-type]
        assert (status, set(told)) == (401, {"error", "exit_code"})
        assert str(tmp_path / "control.token") in told["error"]
    assert len(flower.started) == 1


def test_a_runs_process_has_a_token_for_that_run_and_another_after_a_restart(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run, other = ordered(control), ordered(control)
    first, second = (secrets["FEDVEIL_RUN_TOKEN"] for secrets in flower.processes)
    poll = json.dumps({"wake": [], "waiting": [], "since": 0, "hold": 0}).encode()
    as_json = {"content-type": "application/json"}
    for token, path, status in (
        (first, f"/runs/{run}/poll", 200), (second, f"/runs/{run}/poll", 401), (control._token, f"/runs/{run}/poll", 401),
        (first, f"/runs/{other}/poll", 401), (first, f"/runs/{run}", 401), (first, "/status", 401), ("", "/runs/none/poll", 401),
    ):  # fmt: skip
        headers = as_json | {"authorization": f"Bearer {token}"}
        assert told_to(control, "POST" if "poll" in path else "GET", path, headers, poll)[0] == status, (token, path)
    assert [secrets["FEDVEIL_TASK_TOKEN"] for secrets in flower.processes] == ["task of 1001", "task of 1002"]
    later, _ = at(tmp_path)
    asyncio.run(later.go_on())
    assert flower.processes[-2]["FEDVEIL_RUN_TOKEN"] not in (first, second)
    assert later._token == control._token  # as the copies that people have


def test_a_token_that_others_could_read_is_replaced(flower, tmp_path) -> None:
    first = at(tmp_path)[0]._token
    path = tmp_path / "control.token"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    second = at(tmp_path)[0]._token
    path.write_text("damaged")
    third = at(tmp_path)[0]._token
    assert len({first, second, third}) == 3
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json", "transfer-encoding": "chunked"}, 411),
        ({"content-type": "application/json", "content-length": str(1 << 40)}, 413),
        ({"content-type": "application/json", "content-length": "-1"}, 411),
        ({"content-type": "application/json", "origin": "http://localhost:9093.evil.example"}, 403),
        ({"content-type": "application/json", "origin": "http://localhost:8000"}, 403),
        ({"content-type": "application/json; charset=utf-8", "origin": "http://localhost:9093"}, 200),
        ({"content-type": "application/json", "sec-fetch-site": "same-site"}, 403),
    ],
)
def test_what_is_no_order_is_refused_before_its_body_is_read(flower, tmp_path, headers, status) -> None:
    control, _ = at(tmp_path)
    read: list[bool] = []

    async def ask() -> int:
        body = json.dumps(ORDER).encode()
        raw = {
            "host": "localhost:9093",
            "content-length": str(len(body)),
            "authorization": f"Bearer {control._token}",
        } | headers
        if "transfer-encoding" in headers:
            del raw["content-length"]
        answers: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            read.append(True)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/runs", "raw_path": b"/runs", "query_string": b"",
            "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 9093), "state": {},
            "headers": [(name.encode(), value.encode()) for name, value in raw.items()], "asgi": {"version": "3.0"},
        }  # fmt: skip
        await control.app(scope, receive, send)
        return int(answers[0]["status"])

    assert asyncio.run(ask()) == status
    assert bool(read) == (status == 200)


def test_health_is_told(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    control._connected = {101}
    assert asking(control, ("GET", "/health", None))[0] == (200, {"status": "ok"})
    control._link.child.running = False
    assert asking(control, ("GET", "/health", None))[0][0] == 503


def test_an_unknown_run_is_named_with_those_that_are_known(flower, tmp_path) -> None:
    control, _ = at(tmp_path)
    run = ordered(control)
    status, told = asking(control, ("GET", "/runs/nothing", None))[0]
    assert status == 409
    assert f"there is no run 'nothing' on this server; the newest are: {run}" in told["error"]


def test_a_folder_whose_path_is_too_long_for_a_socket_is_named_before_anything_starts(tmp_path) -> None:
    path = tmp_path / ("x" * 120) / "superlink"
    with pytest.raises(DeploymentError, match=r"TMPDIR: the path of a socket there.*shorter path"):
        start_superlink(path, tmp_path / "superlink.db", True, tmp_path / "superlink.log")
    assert not (tmp_path / "superlink.log").exists()
