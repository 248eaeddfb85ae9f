"""The control interface of a running server, for its own machine: start, follow and stop runs, show its status.

It listens on loopback only (or is reached through an SSH tunnel), and takes orders from whoever has its token, a file that
the server's own user alone can read. A run's process has a token of its own, for that run.
Every order is stored before its run starts, so that a server that was killed resumes it.
"""

from __future__ import annotations

import asyncio
import csv
import json
import re
import time
import tomllib
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from logging import Logger
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedveil import __version__
from fedveil.core.errors import DeploymentError, FedveilError, Interrupted, SettingsError
from fedveil.core.foreign import reading
from fedveil.core.record.record import write_atomically
from fedveil.core.settings.experiment import Experiment
from fedveil.core.subprocesses import Child
from fedveil.server.flower import TASK_TOKEN
from fedveil.server.serving.checks import check_order
from fedveil.server.serving.node_gateway import NodeGateway
from fedveil.server.serving.superlink import SuperLink, ended, online, start_process, start_run, stop_run, take
from fedveil.server.serving.tokens import RUN_TOKEN, Guard, keep_token, new_token, proof, same, token_path

RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
LOOK, WORDLESS = 1.0, 5.0  # seconds
SILENT = 30.0  # seconds without a call after which a client counts as lost; each calls every few seconds
HOLD = 2.0  # seconds that a poll of a run's process may be held
_LOG_PART = 1 << 20  # bytes of a log in one answer
_OF_A_RUN = re.compile(r"/runs/([^/]+)/(?:poll|result)")  # what a run's process asks for


@dataclass
class Order:
    """A run that was ordered.

    run: its name, and that of its record's folder; experiment: as TOML; words: its vocabulary, a line each
    flower_run, series: Flower's ids; result: the run's summary, or why it ended
    started: when it was ordered, seconds since the epoch
    reproducible: clients' training repeats from the seed
    """

    run: str
    experiment: str
    words: str = ""
    flower_run: int = 0
    series: int = 0
    status: str = RUNNING
    result: dict[str, Any] | None = None
    stop: bool = False
    started: float = 0.0
    reproducible: bool = False
    over: float = 0.0  # when Flower reported its end, on the monotonic clock


class ControlServer:
    """The server's runs, and the interface to them.

    state: the server's folder; keys: its folder of keys, or None; url: of this interface
    nodes: clients by the ids of their nodes; empty where any node may join
    finish: receives the folder of every complete record
    look: seconds between looks at the runs
    wordless: seconds after Flower ended a run within which its result must arrive
    vouch: receives the address and port of a connection that brought a token, and the token
    """

    def __init__(
        self,
        state: Path,
        keys: Path | None,
        link: SuperLink,
        gateway: NodeGateway,
        nodes: dict[int, int],
        url: str,
        finish: Callable[[Path], None],
        log: Logger,
        *,
        look: float = LOOK,
        wordless: float = WORDLESS,
        vouch: Callable[[tuple[str, int] | None, Hashable], None] = lambda _peer, _token: None,
    ) -> None:
        self._state, self._keys, self._link, self._gateway, self._nodes = state, keys, link, gateway, nodes
        self._url, self._finish, self._log = url, finish, log
        self._look, self._wordless = look, wordless
        self._started = time.time()
        self._connected: set[int] = set()
        self._token, self._tokens = keep_token(state), dict[str, str]()
        self._processes: dict[str, Child] = {}
        self._launching = asyncio.Lock()
        self._orders: dict[str, Order] = {}
        for path in sorted(self._folder.glob("*.json")):
            order = Order(**json.loads(path.read_text("utf-8")))
            self._orders[order.run] = order
        self.app = Starlette(
            routes=[
                Route("/", self._index),
                Route("/health", self._health),
                Route("/status", self._status),
                Route("/runs", self._order, methods=["POST"]),
                Route("/runs/{run}", self._run),
                Route("/runs/{run}/log", self._log_part),
                Route("/runs/{run}/stop", self._stop, methods=["POST"]),
                Route("/runs/{run}/resume", self._resume, methods=["POST"]),
                Route("/runs/{run}/poll", self._poll, methods=["POST"]),
                Route("/runs/{run}/result", self._result, methods=["POST"]),
            ],
            middleware=[
                # a web page in this machine's browser must not give orders, through another host name or from its own
                Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"]),
                Middleware(Guard, allowed=self._allowed, where=token_path(state), vouch=vouch),
            ],
            exception_handlers={FedveilError: _explain},
        )

    @property
    def _folder(self) -> Path:
        return self._state / "orders"

    def record(self, run: str) -> Path:
        """Return the folder of a run's record."""
        return self._state / "runs" / run

    def log_path(self, run: str) -> Path:
        """Return the path of a run's log."""
        return self._state / "logs" / f"{run}.log"

    def _allowed(self, path: str, token: str) -> bool:
        """Say whether a token may ask for a path: a run's own for what its process asks, else the server's."""
        found = _OF_A_RUN.fullmatch(path)
        return same(token, self._tokens.get(found[1], "") if found else self._token)

    async def go_on(self) -> None:
        """Resume the runs that were going on when the last server ended."""
        for order in list(self._orders.values()):
            if order.status == RUNNING:
                self._log.info("going on with %s", order.run)
                await asyncio.to_thread(stop_run, self._link, order.flower_run)
                await self._launch(order)

    async def _launch(self, order: Order) -> None:
        resume = (self.record(order.run) / "experiment.toml").exists()  # the last that a new record gets
        settings = {
            "experiment": order.experiment,
            "words": order.words,
            "record": str(self.record(order.run).absolute()),
            "control": f"{self._url}/runs/{order.run}",
            "resume": "yes" if resume else "",
            "keys": str(self._keys.absolute()) if self._keys else "",
            "limit": str(self._gateway.limit),
            "reproducible": "yes" if order.reproducible else "",
        }
        order.started = order.started or time.time()
        order.status, order.result, order.stop, order.over = RUNNING, None, False, 0.0
        self._keep(order)  # stored before it starts: a server that is killed now resumes it
        try:
            async with self._launching:  # a task that is taken is then that of this run
                started = await asyncio.to_thread(start_run, self._link, settings, order.series)
                order.flower_run, order.series = started
                self._keep(order)
                task = await asyncio.to_thread(take, self._link, order.flower_run)
        except DeploymentError as error:
            self._end(order, FAILED, {"error": str(error)})
            raise
        self._tokens[order.run] = new_token()
        given = {TASK_TOKEN: task, RUN_TOKEN: self._tokens[order.run]}
        log = self._state / "logs" / f"{order.run}-process.log"
        self._processes[order.run] = start_process(self._link, order.run, given, log)

    def _keep(self, order: Order) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._orders[order.run] = order
        write_atomically(self._folder / f"{order.run}.json", json.dumps(asdict(order), indent=1).encode())

    def _find(self, request: Request) -> Order:
        run = request.path_params["run"]
        if run not in self._orders:
            known = ", ".join(list(self._orders)[-5:]) or "none"
            raise DeploymentError(f"there is no run '{run}' on this server; the newest are: {known}")
        return self._orders[run]

    async def watch(self) -> None:
        """Update the connected nodes, and mark runs whose app ended without a result as failed, until cancelled."""
        while True:
            await asyncio.sleep(self._look)
            with suppress(httpx.HTTPError):
                self._connected = await self._online()
            for run in [run for run, process in self._processes.items() if not process.running]:  # reaps it
                del self._processes[run]
            for order in [o for o in self._orders.values() if o.status == RUNNING]:
                try:
                    words = await asyncio.to_thread(ended, self._link, order.flower_run)
                except httpx.HTTPError:
                    continue  # the SuperLink is ending, which `serve` notices
                if words is None or order.status != RUNNING:
                    continue
                order.over = order.over or time.monotonic()
                if time.monotonic() - order.over > self._wordless:
                    self._end(order, FAILED, {"error": f"its process ended without a word ({words}); see its log"})

    def _end(self, order: Order, status: str, result: dict[str, Any]) -> None:
        order.status, order.result = status, result
        self._keep(order)
        self._log.info("%s %s %s", order.run, status, result.get("error", ""))

    async def _health(self, _request: Request) -> Response:
        running = self._link.child.running
        return JSONResponse({"status": "ok" if running else "failed"}, 200 if running else 503)

    async def _online(self) -> set[int]:
        return await asyncio.to_thread(online, self._link)

    async def _status(self, _request: Request) -> Response:
        agreed = self._keys and self._keys / "privacy.toml"
        connected = await self._online()
        return JSONResponse({
            "fedveil": __version__,
            "state": str(self._state.absolute()),
            "up_seconds": round(time.time() - self._started, 1),
            "clients": [
                {"client": node.client, "name": None if node.client is None else f"client-{node.client + 1}",
                 "address": node.address, "starts": node.starts,
                 "connected": node.node_id in connected, "seen_seconds_ago": round(time.time() - node.seen, 1)}
                for node in self._gateway.nodes
            ],
            "registered": len(self._nodes) or None,
            "agreed": agreed.read_text("utf-8") if agreed and agreed.exists() else "",
            "refused": [{"client": client, "reason": why} for _, client, why in list(self._gateway.refused)[-10:]],
            "runs": [self._progress(order) for order in self._orders.values()],
        })  # fmt: skip

    def _progress(self, order: Order) -> dict[str, Any]:
        """Return how far a run is: its whole rounds, its newest scores, and the seconds since it was ordered."""
        path = self.record(order.run) / "metrics.csv"
        newest: dict[str, str] = {}
        if path.exists():
            with path.open(newline="") as file:
                newest = next(iter(deque(csv.DictReader(file), maxlen=1)), {})
        scores = {key: float(value) for key, value in newest.items() if value and key.endswith(("_accuracy", "_loss"))}
        return {
            "run": order.run,
            "status": order.status,
            "round": int(newest.get("round") or 0),
            "rounds": tomllib.loads(order.experiment)["federation"]["rounds"],
            "scores": scores,
            "seconds": round(time.time() - order.started, 1) if order.status == RUNNING else None,
        }

    async def _index(self, request: Request) -> Response:
        """Say what there is to ask for, where the token is, and, to who sends a `nonce`, show that this server knows it."""
        paths = {
            "/status": "clients and runs",
            "/health": "200 while all is well",
            "/runs/NAME": "one run",
            "/runs/NAME/log": "its log",
        }
        nonce, port = request.query_params.get("nonce", ""), int(self._url.rpartition(":")[2])
        shown = {"proof": proof(self._token, port, nonce[:64])} if nonce else {}
        return JSONResponse({"fedveil": __version__, "paths": paths, "token": str(token_path(self._state)), **shown})

    async def _order(self, request: Request) -> Response:
        """Start a run: `{"experiment": TOML, "words": "a line each", "reproducible": false}`."""
        with reading(lambda why: SettingsError(f"the order of a run cannot be read: {why}")):
            asked = await request.json()
            text, words = str(asked["experiment"]), str(asked.get("words", ""))
            reproducible = bool(asked.get("reproducible", False))
        experiment = Experiment.received(text)  # code that it names is imported by the run alone
        check_order(experiment, len(self._nodes) if self._keys else None, words)
        name = f"{experiment.name}-{datetime.now():%Y%m%d-%H%M%S}"
        run, number = name, 1
        while run in self._orders:
            number += 1
            run = f"{name}-{number}"
        order = Order(run, experiment.toml(), words, reproducible=reproducible)
        await self._launch(order)
        return JSONResponse({"run": run})

    async def _resume(self, request: Request) -> Response:
        order = self._find(request)
        if order.status == RUNNING:
            raise DeploymentError(f"{order.run} is running already")
        if order.status == DONE:
            raise DeploymentError(f"{order.run} is done; there is no round left to run")
        await self._launch(order)
        return JSONResponse({"run": order.run})

    async def _run(self, request: Request) -> Response:
        order = self._find(request)
        return JSONResponse({
            "run": order.run, "status": order.status, "result": order.result, "record": str(self.record(order.run).absolute()),
            "experiment": order.experiment,
        })  # fmt: skip

    async def _log_part(self, request: Request) -> Response:
        """Return a run's log from byte `offset` on; without an offset, the position of its end."""
        order = self._find(request)
        path = self.log_path(order.run)
        end = path.stat().st_size if path.exists() else 0
        given = request.query_params.get("offset", "")
        offset = min(int(given), end) if given.isdecimal() else end
        if offset == end:
            return JSONResponse({"text": "", "offset": end})
        with path.open("rb") as file:
            file.seek(offset)
            part = file.read(_LOG_PART)
        whole = part[: part.rfind(b"\n") + 1]
        return JSONResponse({"text": whole.decode("utf-8", "replace"), "offset": offset + len(whole)})

    async def _stop(self, request: Request) -> Response:
        """Ask a run to stop after its current messages; its saved rounds stay."""
        order = self._find(request)
        if order.status != RUNNING:
            raise DeploymentError(f"{order.run} is not running: it is {order.status}")
        order.stop = True
        return JSONResponse({"run": order.run})

    async def _poll(self, request: Request) -> Response:
        """Answer a poll of a run's process with the events that it should know.

        wake: ids of nodes with new messages; waiting: ids of messages without a reply yet
        since: number of the last refusal that the process knows; hold: seconds that the answer may wait for a reply
        """
        order, asked = self._find(request), await request.json()
        gateway = self._gateway
        gateway.wake(int(node) for node in asked["wake"])
        deadline = time.monotonic() + min(float(asked["hold"]), HOLD)
        waiting = set(asked["waiting"])
        while (
            not (waiting & (gateway.arrived.keys() | gateway.lost.keys()))
            and not order.stop
            and (left := deadline - time.monotonic()) > 0
        ):
            gateway.arrival.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(gateway.arrival.wait(), left)
        here = waiting & gateway.arrived.keys()
        for message in here:
            del gateway.arrived[message]
        refused = [entry for entry in gateway.refused if entry[0] > asked["since"]]
        # where no node is heard, or none was until now, no node counts as lost
        settled = not gateway.deaf and time.time() - gateway.back > SILENT
        online = self._connected if settled else self._connected | {node.node_id for node in gateway.nodes}
        return JSONResponse({
            "stop": order.stop,
            "arrived": sorted(here),
            "lost": sorted(waiting & gateway.lost.keys()),
            "clients": {str(node): client for node, client in self._nodes.items()},
            "online": [str(node) for node in online],
            "starts": {str(node.node_id): node.starts for node in gateway.nodes},
            "silent": [
                str(node.node_id)
                for node in (gateway.nodes if settled else [])
                if node.client is not None and time.time() - node.seen > SILENT
            ],
            "deaf": gateway.deaf,
            "refused": [[client, why] for _, client, why in refused],
            "since": refused[-1][0] if refused else asked["since"],
        })  # fmt: skip

    async def _result(self, request: Request) -> Response:
        """Take the result of a run from its process."""
        order, told = self._find(request), await request.json()
        status = told["status"]
        if status in (DONE, STOPPED) and self.record(order.run).exists():
            try:
                await asyncio.to_thread(self._finish, self.record(order.run))
            except Exception:  # a run does not fail for its pictures
                self._log.exception("%s: no pictures", order.run)
        self._end(order, status, told["result"])
        return JSONResponse({})


async def _explain(_request: Request, error: Exception) -> Response:
    assert isinstance(error, FedveilError)
    status = 409 if isinstance(error, Interrupted | DeploymentError) else 400
    return JSONResponse({"error": str(error), "exit_code": error.exit_code}, status)
