"""Flower's internals (1.41) that a client needs: how a node signs its calls, and a node's runtime interface.

A SuperNode in `process` isolation starts no process itself. The holder of its secret takes its tasks over HTTP, pulls
each message as a tree of objects, and pushes the reply the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_from_proto, message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedveil.core.errors import DeploymentError
from fedveil.core.wire.flower import act_as, identify

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "TIMESTAMP_HEADER",
    "NodeRuntime",
    "Task",
    "public_key_to_bytes",
    "sign_message",
]

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"  # the one call that the SuperNode's secret signs


class NodeRuntime:
    """The runtime interface of the SuperNode at `address`, for the holder of its secret; a context manager.

    Every call raises httpx.HTTPError where the SuperNode does not answer.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        self._client = self._connect(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[ACQUIRE]))

    def __enter__(self) -> NodeRuntime:
        self._client.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._client.__exit__(*error)

    def acquire(self) -> str | None:
        """Take the next message to answer, and return the token of its task; None where there is no message."""
        acquired = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        return acquired.token if acquired.HasField("task") and acquired.token else None

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        """Work on a task: send heartbeats to the SuperNode meanwhile, and at the end whether it failed."""
        with self._connect(RuntimeTokenHttpInterceptor(token)) as client:
            heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            heartbeat.start()
            task, details = Task(client), "the client could not take the message"
            try:
                yield task
                details = ""
            finally:
                client.PushTaskOutput(
                    PushTaskOutputRequest(
                        context=context_to_proto(task.context) if task.context else None,
                        sub_status=SubStatus.FAILED if details else SubStatus.COMPLETED,
                        details=details,
                    )
                )
                heartbeat.stop()

    def _connect(self, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="fedveil client")
        return RuntimeHttpClient.from_server_address(
            self._address, insecure=True, root_certificates=None, interceptors=[version, *interceptors]
        )


class Task:
    """One message of a SuperNode, and its reply.

    context: the context that the SuperNode keeps for the next message; None until there is a reply
    """

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self.context: Context | None = None

    def pull(self) -> tuple[Context, bytes, Message]:
        """Pull the context, the bundle of the run's app, and the message; raise DeploymentError where there is none."""
        given = self._client.PullTaskInput(PullTaskInputRequest())
        act_as(given.run.run_id, given.context.node_id, given.task_id)
        context, fab = context_from_proto(given.context), fab_from_proto(given.fab)
        pulled = self._client.PullMessages(PullAppMessagesRequest())
        if not pulled.messages_list:
            raise DeploymentError("the SuperNode has work and no message for it")
        tree, node = pulled.message_object_trees[0], Node(node_id=context.node_id)
        message: Message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, context.run_id),
            return_type=Message,
        )
        identify(message, tree.object_id)
        return context, fab.content, message

    def push(self, reply: Message, context: Context) -> None:
        """Push the reply, and the context to keep."""
        self.context = context
        identify(reply, reply.object_id)
        with no_object_id_recompute():
            sent = self._client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    self._client.PushObject,
                    Node(node_id=context.node_id),
                    run_id=context.run_id,
                    session_id=sent.session_id,
                ),
                object_ids_to_push=set(sent.objects_to_push),
            )
