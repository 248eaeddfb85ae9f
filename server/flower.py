"""Flower's internals (1.41) that a server needs: its SuperLink and the apps of runs, and the calls of its HTTP interfaces.

Flower's own commands listen on TCP, where every user of the machine reaches them, and name the secret of a run's task on a
command line, which every user can read. Here the same SuperLink listens on a Unix socket, and a run's app is given its
secret in its environment.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import httpx

# a node's signature, and the difference allowed to its clock: the gateway checks both before the SuperLink does
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE

# an operator's calls to the SuperLink: register nodes; start, list and stop runs
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab

# a node's calls, which the gateway forwards
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest, PushObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TaskType

# the client for an operator's calls, and their errors
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "SYSTEM_TIME_TOLERANCE",
    "TASK_TOKEN",
    "TIMESTAMP_HEADER",
    "TIMESTAMP_TOLERANCE",
    "ActivateNodeResponse",
    "ConfirmMessageReceivedRequest",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "Fab",
    "FlowerError",
    "ListNodesRequest",
    "ListRunsRequest",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "PushMessagesRequest",
    "PushMessagesResponse",
    "PushObjectRequest",
    "PushObjectResponse",
    "RegisterNodeRequest",
    "Scalar",
    "StartRunRequest",
    "StopRunRequest",
    "UnregisterNodeRequest",
    "bytes_to_public_key",
    "control_client",
    "own_replies",
    "read_call",
    "run_app",
    "run_superlink",
    "take_task",
    "verify_signature",
]

TASK_TOKEN = "FEDVEIL_TASK_TOKEN"  # environment of a run's app: the secret of its task
NOWHERE = "superlink"  # the host that calls over the socket name; it is never looked up
Client = TypeVar("Client", bound=ProtobufClient)


def read_call(kind: Any, body: bytes) -> Any:
    """Return the message of Flower's that a node's call holds; raise ProtectionError where it holds none."""
    with reading(ProtectionError):
        return kind.FromString(body)


def own_replies(body: bytes) -> bool:
    """Say whether replies are the pushing node's own: Flower checks who calls, and not that its replies name it."""
    pushed = read_call(PushMessagesRequest, body)
    return all(message.metadata.src_node_id == pushed.node.node_id for message in pushed.messages_list)


def control_client(path: Path) -> ControlHttpClient:
    """Return a client of the control interface of the SuperLink at a socket; the caller closes it."""
    return _client(ControlHttpClient, path)


def take_task(path: Path) -> tuple[int, str] | None:
    """Take the next run that waits for its app from the SuperLink at a socket.

    Return Flower's id of the run, and the secret that proves its app to the SuperLink; None where no run waits.
    """
    with _client(RuntimeHttpClient, path) as client:
        taken = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    return (taken.task.run_id, taken.token) if taken.HasField("task") and taken.token else None


def _client(kind: type[Client], path: Path) -> Client:
    made = kind(f"http://{NOWHERE}", interceptors=[RuntimeVersionHttpInterceptor(component_name="fedveil server")])
    _lead(made, path)
    return made


def _lead(client: ProtobufClient, path: Path) -> None:
    """Let one of Flower's HTTP clients connect to a Unix socket, whatever address it was given."""
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=client._client.timeout)


def run_superlink() -> None:
    """Run Flower's SuperLink in this process, until SIGTERM: its command line is SOCKET DATABASE REGISTERED.

    SOCKET: the path of a Unix socket, in a folder of mode 0700; REGISTERED: `yes` where registered nodes alone may join
    """
    import uvicorn
    from flwr.common.constant import TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    path, database, registered = sys.argv[1:]
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):
        os.environ.pop(name, None)  # they open further ports
    config = SuperLinkLifespanConfig(
        host=NOWHERE, port=0, control_address="", fleet_api_address=None, health_server_address=None,
        insecure=True, certificates=None, ssl_ca_certfile=None, ssl_certfile=None, ssl_keyfile=None,
        authn_plugin=load_control_authn_plugin(), superexec_auth_secret=None, enable_supernode_auth=registered == "yes",
        event_log_plugin=None, fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE, simulation=False, database=database,
        isolation="process", runtime_dependency_install=False,
    )  # fmt: skip
    app = create_app(config, SuperLinkLifespan)
    settings = uvicorn.Config(app, log_config=get_uvicorn_log_config(console_handler.level), access_log=False)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        os.chmod(path, 0o600)
        uvicorn.Server(settings).run([listening])


def run_app() -> None:
    """Run the app of a run in this process, until it ends: its command line is SOCKET, its secret in the environment."""
    from flwr.supercore.logger import mirror_output_to_queue, restore_output
    from flwr.superlink.runtime import run_serverapp

    (path,) = sys.argv[1:]
    begin = ProtobufClient.__init__

    def begin_at_socket(self: ProtobufClient, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        _lead(self, Path(path))

    ProtobufClient.__init__ = begin_at_socket  # type: ignore[method-assign]
    said: Queue[str | None] = Queue()
    mirror_output_to_queue(said)
    run_serverapp(
        NOWHERE,
        said,
        os.environ.pop(TASK_TOKEN),
        insecure=True,
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )
    restore_output()
