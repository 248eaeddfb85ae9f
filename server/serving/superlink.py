"""Flower's SuperLink as FedVeil runs it: on loopback, with its control part for the server's own machine alone.

Only this module knows the SuperLink's options and its control interface (Flower 1.41).
"""

from __future__ import annotations

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
    RuntimeVersionHttpInterceptor,
    Scalar,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)

HOST = "127.0.0.1"
ROUTINE = ("[uvicorn.access]", "ControlServicer.ListNodes", "ControlServicer.ListRuns")  # of its log, every second
STARTING = 60.0  # seconds that a SuperLink may take to start


@dataclass(frozen=True)
class Certificates:
    """The files of the server's TLS certificate, its private key, and the authority that clients and server trust."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, folder: Path) -> Certificates:
        """Return the files that `fedveil keys new --host` makes in a folder."""
        return cls(folder / "server.pem", folder / "server.key", folder / "ca.pem")


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink, and the access to it.

    certificates: None where it speaks plain HTTP and takes any node
    """

    child: Child
    port: int
    certificates: Certificates | None

    @property
    def url(self) -> str:
        """The address that it listens on."""
        return f"{'http' if self.certificates is None else 'https'}://{HOST}:{self.port}"

    def control(self) -> ControlHttpClient:
        """Return a client of its control interface, which the caller closes."""
        return ControlHttpClient.from_server_address(
            f"{HOST}:{self.port}",
            insecure=self.certificates is None,
            root_certificates=None if self.certificates is None else str(self.certificates.authority),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedveil server")],
        )


def start_superlink(port: int, database: Path, certificates: Certificates | None, log: Path) -> SuperLink:
    """Start a SuperLink on loopback and wait until it answers.

    Raise DeploymentError with its output where it does not.
    """
    command = [
        "flower-superlink",
        *("--host", HOST, "--port", str(port), "--database", str(database)),
        "--disable-runtime-dependency-installation",
    ]
    if certificates is None:
        command.append("--insecure")
    else:
        command += ["--ssl-certfile", str(certificates.certificate), "--ssl-keyfile", str(certificates.key)]
        command += ["--ssl-ca-certfile", str(certificates.authority), "--enable-supernode-auth"]
    child = Child("flower-superlink", command, log, {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}, unsaid=ROUTINE)
    link = SuperLink(child, port, certificates)

    def answers() -> bool:
        try:
            with link.control() as control:
                control.ListNodes(ListNodesRequest())
        except httpx.HTTPError:
            return False
        return True

    wait_for(answers, child, STARTING, "Flower's SuperLink")
    return link


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
