"""Flower's SuperLink as FedVeil runs it: on a Unix socket for the server's own user alone, and the processes of its runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx

from fedveil.core.errors import DeploymentError
from fedveil.core.subprocesses import Child, wait_for
from fedveil.core.wire.bundle import bundle
from fedveil.server.flower import (
    ControlHttpClient,
    Fab,
    FlowerError,
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    Scalar,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
    control_client,
    take_task,
)

LAUNCH = "from fedveil.server.flower import {0}; {0}()"
ROUTINE = ("ControlServicer.ListNodes", "ControlServicer.ListRuns")  # of its log, every second
LONGEST_PATH = 103  # bytes of a Unix socket's path on macOS; Linux allows 107
STARTING = 60.0  # seconds that a SuperLink may take to start
TAKING = 10.0  # seconds within which a run that was started waits for its app


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink, and the access to it.

    path: of the Unix socket that it listens on
    """

    child: Child
    path: Path

    def control(self) -> ControlHttpClient:
        """Return a client of its control interface, which the caller closes."""
        return control_client(self.path)


def start_superlink(path: Path, database: Path, registered: bool, log: Path) -> SuperLink:
    """Start a SuperLink and wait until it answers; raise DeploymentError with its output where it does not.

    path: of the Unix socket that it listens on, in a folder that no other user may enter
    registered: whether registered nodes alone may join
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise DeploymentError(
            f"TMPDIR: the path of a socket there, {path}, is longer than the {LONGEST_PATH} bytes that the system allows; name a "
            "folder with a shorter path"
        )
    # -P: nothing is imported from the working folder
    command = [sys.executable, "-P", "-c", LAUNCH.format("run_superlink"), str(path), str(database)]
    child = Child("flower-superlink", [*command, "yes" if registered else "no"], log, unsaid=ROUTINE)
    link = SuperLink(child, path)

    def answers() -> bool:
        try:
            with link.control() as control:
                control.ListNodes(ListNodesRequest())
        except httpx.HTTPError:
            return False
        return True

    wait_for(answers, child, STARTING, "Flower's SuperLink")
    return link


def take(link: SuperLink, run: int) -> str:
    """Take a run that was started from the SuperLink; return the secret that proves its app.

    Raise DeploymentError where it does not wait for its app.
    """
    deadline = time.monotonic() + TAKING
    while time.monotonic() < deadline:
        taken = take_task(link.path)
        if taken is None:
            time.sleep(0.05)
        elif taken[0] == run:  # any other was ordered before the server was restarted, and is over
            return taken[1]
    raise DeploymentError("Flower's SuperLink has nothing to do for the run; its log says why")


def start_process(link: SuperLink, name: str, secrets: Mapping[str, str], log: Path) -> Child:
    """Start the process of a run that was taken, which runs the installed app. Call this from the main thread.

    name: of the run; secrets: variables of its environment, which no other user can read; log: of its output
    """
    return Child(name, [sys.executable, "-P", "-c", LAUNCH.format("run_app"), str(link.path)], log, secrets)


def register_nodes(link: SuperLink, keys: Mapping[int, bytes]) -> dict[int, int]:
    """Let only the owners of public keys (PEM, by client) join as nodes; return the client of each node id."""
    with link.control() as control:
        known = {
            node.public_key: node.node_id
            for node in control.ListNodes(ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }
        wanted = set(keys.values())
        for public, node in known.items():
            if public not in wanted:
                control.UnregisterNode(UnregisterNodeRequest(node_id=node))
        for client, public in keys.items():
            if public not in known:
                name = f"client-{client + 1}"
                known[public] = control.RegisterNode(RegisterNodeRequest(public_key=public, name=name)).node_id
    return {known[public]: client for client, public in keys.items()}


def start_run(link: SuperLink, settings: Mapping[str, str], series: int = 0) -> tuple[int, int]:
    """Start FedVeil's own app with a run configuration; return Flower's ids of the run and its series.

    series: of an earlier run that this one resumes, whose state the nodes keep
    """
    request = StartRunRequest(
        fab=Fab(hash_str=sha256(bundle()).hexdigest(), content=bundle()),
        override_config={key: Scalar(string=value) for key, value in settings.items()},
    )
    if series:
        request.series_id = series
    try:
        with link.control() as control:
            response = control.StartRun(request)
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        raise DeploymentError(f"Flower's SuperLink refused the run: {told.message if told else error}") from error
    if not response.HasField("run_id"):
        raise DeploymentError("Flower's SuperLink did not start the run; its log says why")
    return response.run_id, response.series_id


def stop_run(link: SuperLink, run: int) -> None:
    """Stop a run that Flower still counts as running."""
    try:
        with link.control() as control:
            control.StopRun(StopRunRequest(run_id=run))
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise  # a run that has ended cannot be stopped, which is no error


def ended(link: SuperLink, run: int) -> str | None:
    """Return how a run ended, in Flower's words; None while it has not."""
    with link.control() as control:
        found = control.ListRuns(ListRunsRequest(run_id=run)).run_dict.get(run)
    if found is None:
        return "unknown to the SuperLink"
    if found.status.status != "finished":
        return None
    return f"{found.status.sub_status}{': ' if found.status.details else ''}{found.status.details}"


def online(link: SuperLink) -> set[int]:
    """Return the ids of the connected nodes."""
    with link.control() as control:
        return {node.node_id for node in control.ListNodes(ListNodesRequest()).nodes_info if node.status == "online"}
