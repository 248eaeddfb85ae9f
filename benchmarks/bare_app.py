"""The same work as a bare Flower app: a SuperLink, SuperNodes, and `flwr run`, as Flower's guides start them."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.deployed import STARTING, started
from benchmarks.memory import Watch
from fedveil.core.errors import FedveilError
from fedveil.core.subprocesses import free_port, wait_for

LONGEST = 1200.0  # seconds of one run
SERVER = "server"
_MODULE = "flower_app"


@dataclass(frozen=True)
class BareRun:
    """The times and the memory of one run.

    rounds: for each round, in seconds since the epoch, when its messages were `pushed`, its slowest client's process
        was `started`, had its message (`ready`) and had `trained`, its replies were `gathered`, and its `end`
    memory: peaks of the SuperLink's processes and of each SuperNode's, in MB
    """

    rounds: list[dict[str, float]]
    memory: Mapping[str, float]


def run_bare(job: Mapping[str, Any], folder: Path) -> BareRun:
    """Run `peers/flower_app.py` with a job in an empty folder.

    job: has `clients` and `rounds`, beside what the app reads
    Raises FedveilError, with the last lines of the log, where the run fails.
    """
    output, port = folder / "rounds.json", free_port()
    app, home = folder / "app", folder / "home"
    _write_app(app, {"job": json.dumps(job), "output": str(output)})
    home.mkdir()
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "here", "here": connection}}))
    environment = {"FLWR_HOME": str(home)}
    with ExitStack() as stack:
        command = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        link = stack.enter_context(started(SERVER, command, folder, environment))
        wait_for(partial(_listens, port), link, STARTING, "Flower's SuperLink")
        roots = {SERVER: link.process.pid}
        for client in range(job["clients"]):
            name, own = f"client-{client + 1}", free_port()
            command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
            command += ["--port", str(own), "--node-config", f"partition-id={client} num-partitions={job['clients']}"]
            node = stack.enter_context(started(name, command, folder, environment))
            wait_for(partial(_listens, own), node, STARTING, "Flower's SuperNode")
            roots[name] = node.process.pid
        memory = stack.enter_context(Watch(roots))
        run = stack.enter_context(started("run", ["flwr", "run", str(app), "here", "--stream"], folder, environment))
        # `flwr run` ends with the run, which leaves its output where it succeeded
        wait_for(lambda: output.exists() or not run.running, run, LONGEST, "the run")
        if not output.exists():
            raise FedveilError("benchmark: the bare Flower app failed:\n  " + "\n  ".join(list(run.tail)[-8:]))
        return BareRun(json.loads(output.read_text()), memory.peaks_mb())


def _write_app(app: Path, settings: Mapping[str, str]) -> None:
    """Write the app's folder: the one file of code, and a `pyproject.toml` with the run's settings."""
    app.mkdir()
    shutil.copy(Path(__file__).with_name("peers") / f"{_MODULE}.py", app)
    project = {
        "project": {"name": "bare", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "benchmark",
                    "components": {"serverapp": f"{_MODULE}:server_app", "clientapp": f"{_MODULE}:client_app"},
                    "config": dict(settings),
                }
            }
        },
    }
    (app / "pyproject.toml").write_text(tomli_w.dumps(project))


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
