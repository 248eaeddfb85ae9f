"""Flower's internals (1.41) that a server needs: the calls of the SuperLink's HTTP interfaces."""

from __future__ import annotations

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
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

# the client for an operator's calls, and their errors
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "SYSTEM_TIME_TOLERANCE",
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
    "RuntimeVersionHttpInterceptor",
    "Scalar",
    "StartRunRequest",
    "StopRunRequest",
    "UnregisterNodeRequest",
    "bytes_to_public_key",
    "verify_signature",
]
