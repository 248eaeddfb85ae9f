"""Between Flower's SuperNode and the trainer: takes each message from the one, lets the other answer, and brings the reply back.

The SuperNode runs in Flower's `process` isolation: it starts nothing itself, and whoever holds its secret takes its work. So
nothing of a bundle that a server sends is ever unpacked or executed: its bytes are compared with those of this FedVeil's own.
This is the one place that knows the SuperNode's runtime interface (Flower 1.41; not a public one).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import httpx
from flwr.app import Context, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_from_proto, message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
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
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedveil.client.trainer import Errand, Outcome, reply_to
from fedveil.core.bundle import check_bundle
from fedveil.core.errors import DeploymentError

POLL = (0.05, 0.5)  # seconds between looks for work: while a run goes on, and when none has for a while
BUSY = 30.0  # seconds after the last message in which the next is expected soon


class Relay:
    """Work of one SuperNode.

    ask: lets the trainer answer; raises DeploymentError where it died
    tell: is told why this client refused something, once for each reason
    """

    def __init__(
        self, address: str, secret: bytes, ask: Callable[[Errand], Outcome], tell: Callable[[str], None]
    ) -> None:
        self._address, self._ask, self._tell = address, ask, tell
        auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"])
        self._client = self._connect(auth)
        self._refused: set[str] = set()

    def _connect(self, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="fedveil client")
        return RuntimeHttpClient.from_server_address(
            self._address, insecure=True, root_certificates=None, interceptors=[version, *interceptors]
        )

    def work(self, going_on: Callable[[], bool]) -> None:
        """Take and answer messages while `going_on()`; a SuperNode that does not answer is asked again."""
        last = 0.0
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        with self._client:
            while going_on():
                with suppress(httpx.HTTPError):
                    acquired = self._client.AcquireTask(wanted)
                    if acquired.HasField("task") and acquired.token:
                        self._do(acquired.token)
                        last = time.monotonic()
                        continue
                time.sleep(POLL[0] if time.monotonic() - last < BUSY else POLL[1])

    def _do(self, token: str) -> None:
        """One message."""
        with self._connect(RuntimeTokenHttpInterceptor(token)) as client:
            heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            heartbeat.start()
            context, details = None, "the client could not take the message"
            try:
                context, reply = self._answer(client)
                self._push(client, reply, context)
                details = ""
            finally:
                client.PushTaskOutput(
                    PushTaskOutputRequest(
                        context=context_to_proto(context) if context else None,
                        sub_status=SubStatus.FAILED if details else SubStatus.COMPLETED,
                        details=details,
                    )
                )
                heartbeat.stop()

    def _answer(self, client: RuntimeHttpClient) -> tuple[Context, Message]:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        context, fab = context_from_proto(given.context), fab_from_proto(given.fab)
        pulled = client.PullMessages(PullAppMessagesRequest())
        if not pulled.messages_list:
            raise DeploymentError("the SuperNode has work and no message for it")
        tree = pulled.message_object_trees[0]
        node = Node(node_id=context.node_id)
        message: Message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        try:
            check_bundle(fab.content)
            errand = Errand(message, context.state, dict(context.run_config), context.run_id, context.node_id)
            outcome = self._ask(errand)
        except DeploymentError as error:
            self._once(f"refused: {error}")
            return context, Message(Error(ErrorCode.INVALID_FAB, str(error)), reply_to=message)
        for text in outcome.said or ((outcome.error[1],) if outcome.content is None else ()):
            self._once(text)
        context.state = outcome.state
        return context, reply_to(message, outcome)

    def _once(self, why: str) -> None:
        """Tell this client's operator something that may come with every message, once."""
        if why not in self._refused:
            self._refused.add(why)
            self._tell(why)

    def _push(self, client: RuntimeHttpClient, reply: Message, context: Context) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            sent = client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    client.PushObject,
                    Node(node_id=context.node_id),
                    run_id=context.run_id,
                    session_id=sent.session_id,
                ),
                object_ids_to_push=set(sent.objects_to_push),
            )
