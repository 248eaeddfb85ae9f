"""The gateway: what it passes on, for whom, and what it keeps of it; the SuperLink behind it is a fake."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from logging import getLogger
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    Message,
    Metadata,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node as NodeId
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedveil.core.wire.bundle import code
from fedveil.server.serving import node_gateway as room
from fedveil.server.serving.node_gateway import HELLO, PASSED, UNREGISTERED, NodeGateway

KEY, STRANGER = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
PUBLIC = public_key_to_bytes(KEY.public_key())
NODE = 77


def signed(key: ec.EllipticCurvePrivateKey = KEY, behind: float = 0.0, text: str = "") -> dict[str, str]:
    """Headers of a node's call, made `behind` seconds ago."""
    timestamp = (datetime.now(UTC) - timedelta(seconds=behind)).isoformat()
    public = public_key_to_bytes(key.public_key())
    signature = sign_message(key, (text or timestamp).encode("ascii"))
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(signature).decode(),
    }


class Link:
    """A SuperLink that answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.work: list[PullMessagesResponse] = []
        self.answers: dict[str, Any] = {
            "activate-node": ActivateNodeResponse(node_id=NODE),
            "push-object": PushObjectResponse(stored=True),
            "confirm-message-received": ConfirmMessageReceivedResponse(),
        }
        self.status = 200

    def answer(self, request: httpx.Request) -> httpx.Response:
        """To one call."""
        call = request.url.path.rpartition("/")[2]
        self.asked.append((call, request.content))
        if call == "pull-messages":
            found = self.work.pop(0) if self.work else PullMessagesResponse()
            return httpx.Response(self.status, content=found.SerializeToString())
        made = self.answers.get(call)
        return httpx.Response(self.status, content=made.SerializeToString() if made else b"")

    @property
    def calls(self) -> list[str]:
        """Names of the calls it got."""
        return [call for call, _ in self.asked]


@asynccontextmanager
async def standing(link: Link, registry: dict[bytes, int] | None, limit: int = 10_000_000, **times: Any):
    """A gateway before a fake SuperLink, and a way to call it."""
    async with httpx.AsyncClient(base_url="https://link", transport=httpx.MockTransport(link.answer)) as behind:
        gateway = NodeGateway(behind, registry, {0: NODE}, limit, getLogger("test"), **times)
        transport = httpx.ASGITransport(gateway.app, client=("10.0.0.9", 1234))
        async with httpx.AsyncClient(base_url="https://gate", transport=transport) as outside:
            yield gateway, outside


def running(
    story: Callable[..., Any], registry: dict[bytes, int] | None = None, **options: Any
) -> tuple[NodeGateway, Link]:
    """Run an async story with a gateway, a caller and its link; by default with one registered client."""
    link = Link()

    async def run() -> NodeGateway:
        async with standing(link, {PUBLIC: 0} if registry is None else registry or None, **options) as (
            gateway,
            outside,
        ):
            await story(gateway, outside, link)
            return gateway

    return asyncio.run(run()), link


async def post(outside: httpx.AsyncClient, call: str, body: Any = b"", headers: dict[str, str] | None = None):
    """A node's call."""
    content = body if isinstance(body, bytes) else body.SerializeToString()
    return await outside.post(f"/v1/fleet/{call}", content=content, headers=signed() if headers is None else headers)


def work(message_id: str = "m1") -> PullMessagesResponse:
    """An answer with one message."""
    return PullMessagesResponse(messages_list=[Message(metadata=Metadata(message_id=message_id))])


ASK = PullMessagesRequest(node=NodeId(node_id=NODE))


@pytest.mark.parametrize(
    "path",
    [
        "/", "/health", "/status", "/runs", "/docs", "/openapi.json", "/v1/fleet/", "/v1/fleet/register-node",
        "/v1/fleet/unregister-node", "/v1/control/start-run", "/v1/control/register-node", "/v1/control/stream-logs",
        "/v1/runtime/acquire-task", "/v1/runtime/push-object", "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/activate-node/x", "//v1/control/start-run",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_nothing_but_the_node_part_is_there_even_for_a_registered_key(path, method) -> None:
    async def story(gateway, outside, link) -> None:
        answer = await outside.request(method, path, headers=signed())
        assert answer.status_code in (404, 405)
        assert link.asked == []

    running(story)


@pytest.mark.parametrize("call", PASSED)
@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (dict, "not signed"),
        (lambda: signed(STRANGER), "its key is not registered"),
        (lambda: signed() | {"flwr-public-key": signed(STRANGER)["flwr-public-key"]}, "its key is not registered"),
        (lambda: signed(STRANGER) | {"flwr-public-key": signed()["flwr-public-key"]}, "not by the key that it names"),
        (lambda: signed(text="another text"), "not by the key that it names"),
        (lambda: signed(behind=600), "its clock is 600 s behind the server's"),
        (lambda: signed(behind=-60), "its clock is 60 s ahead of the server's"),
        (lambda: signed() | {"flwr-timestamp": "yesterday"}, "not signed"),
        (lambda: signed() | {"flwr-timestamp": "2026-01-01T00:00:00"}, "not signed"),
        (lambda: signed() | {"flwr-signature": "!"}, "not signed"),
    ],
    ids=["none", "stranger", "swapped", "impostor", "other-text", "late", "early", "no-time", "no-zone", "no-base64"],
)
def test_only_calls_signed_by_registered_keys_are_passed_on(call, headers, why) -> None:
    async def story(gateway, outside, link) -> None:
        answer = await post(outside, call, headers=headers())
        assert answer.status_code == 401
        assert why in answer.json()["error"]
        assert link.asked == []
        ((number, client, reason),) = gateway.refused
        assert (number, client) == (1, None)
        assert why in reason

    running(story)


def test_a_registered_client_is_passed_on_with_its_headers_and_no_others() -> None:
    seen: list[httpx.Headers] = []

    async def story(gateway, outside, link) -> None:
        answered = link.answer
        link.answer = lambda request: (seen.append(request.headers), answered(request))[1]
        gateway._link._transport.handler = link.answer
        extra = {"x-forwarded-for": "127.0.0.1", "cookie": "c", "authorization": "Bearer t"}
        answer = await post(outside, "activate-node", ActivateNodeRequest(public_key=PUBLIC), signed() | extra)
        assert ActivateNodeResponse.FromString(answer.content).node_id == NODE

    running(story)
    assert {"flwr-public-key", "flwr-timestamp", "flwr-signature"} <= set(seen[-1])
    assert not {"x-forwarded-for", "cookie", "authorization"} & set(seen[-1])


def test_hello_says_who_both_are() -> None:
    async def story(gateway, outside, link) -> None:
        told = (await outside.post(HELLO, headers=signed())).json()
        assert (told["client"], told["code"]) == (0, code())
        assert (await outside.post(HELLO, headers=signed(STRANGER))).status_code == 401
        assert gateway.nodes[0].seen > 0

    running(story)


def test_a_server_that_hears_nobody_notes_when_it_hears_somebody_again() -> None:
    clock = [1_000_000.0]

    async def story(gateway, outside, link) -> None:
        for ago, back in ((0, 0.0), (room.DEAF - 1, 0.0), (room.DEAF + 1, clock[0] + 2 * room.DEAF)):
            clock[0] += ago
            assert gateway.deaf == (ago > room.DEAF)
            assert (await outside.post(HELLO, headers=signed())).status_code == 200
            assert (gateway.back, gateway.deaf) == (back, False)

    running(story, clock=lambda: clock[0])


def test_without_a_registry_any_node_may_join() -> None:
    async def story(gateway, outside, link) -> None:
        assert (await outside.post(HELLO)).json()["client"] is None
        for call in UNREGISTERED:
            assert (await post(outside, call, headers=signed(STRANGER))).status_code == 200
        assert (await post(outside, "start-run", headers=signed(STRANGER))).status_code == 404

    running(story, registry={})


def test_a_question_for_work_is_held_until_there_is_some() -> None:
    async def story(gateway, outside, link) -> None:
        asking = asyncio.create_task(post(outside, "pull-messages", ASK))
        while not gateway.nodes or not gateway.nodes[0].held:
            await asyncio.sleep(0.01)
        assert not asking.done()
        link.work.append(work())
        gateway.wake([NODE])
        answer = await asyncio.wait_for(asking, room.LOOK / 2)  # it did not wait for the next look
        assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == "m1"

    running(story)


def test_without_work_the_answer_is_none_after_a_while() -> None:
    async def story(gateway, outside, link) -> None:
        answer = await post(outside, "pull-messages", ASK)
        assert answer.status_code == 200
        assert not PullMessagesResponse.FromString(answer.content).messages_list

    running(story, hold=0.2)


def test_an_answer_that_was_lost_is_given_again_until_it_is_confirmed() -> None:
    async def story(gateway, outside, link) -> None:
        link.work += [work("m1"), work("m2")]
        for _ in range(3):
            answer = await post(outside, "pull-messages", ASK)
            assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == "m1"
        confirmed = ConfirmMessageReceivedRequest(node=NodeId(node_id=NODE), message_object_id="m1")
        await post(outside, "confirm-message-received", confirmed)
        answer = await post(outside, "pull-messages", ASK)
        assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == "m2"

    running(story)


def test_a_node_that_joins_anew_is_not_given_what_it_lost_and_its_old_place_is_freed() -> None:
    async def story(gateway, outside, link) -> None:
        link.work += [work("m1"), work("m2")]
        await post(outside, "activate-node", ActivateNodeRequest(public_key=PUBLIC))
        await post(outside, "pull-messages", ASK)
        await post(outside, "activate-node", ActivateNodeRequest(public_key=PUBLIC))
        answer = await post(outside, "pull-messages", ASK)
        assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == "m2"
        assert gateway.nodes[0].starts == 2

    _, link = running(story)
    freed = [DeactivateNodeRequest.FromString(body).node_id for call, body in link.asked if call == "deactivate-node"]
    assert freed == [NODE, NODE]


def test_two_clients_with_one_key_are_not_both_let_in() -> None:
    async def story(gateway, outside, link) -> None:
        asking = asyncio.create_task(post(outside, "pull-messages", ASK))
        while not gateway.nodes or not gateway.nodes[0].held:
            await asyncio.sleep(0.01)
        answer = await post(outside, "activate-node", ActivateNodeRequest(public_key=PUBLIC))
        assert answer.status_code == 409
        assert "another client with this key is connected" in answer.json()["error"]
        assert "activate-node" not in link.calls
        asking.cancel()

    running(story, listen=0.05)


def test_a_reply_has_arrived_when_its_last_object_has() -> None:
    async def story(gateway, outside, link) -> None:
        link.answers["push-messages"] = PushMessagesResponse(objects_to_push=["a", "b"])
        reply = Message(metadata=Metadata(message_id="r1", reply_to_message_id="m1", src_node_id=NODE))
        await post(outside, "push-messages", PushMessagesRequest(node=NodeId(node_id=NODE), messages_list=[reply]))
        for object_id, here in (("a", False), ("a", False), ("other", False), ("b", True)):
            await post(outside, "push-object", PushObjectRequest(node=NodeId(node_id=NODE), object_id=object_id))
            assert ("m1" in gateway.arrived) == here

    running(story)


def test_a_call_or_an_update_that_is_too_large_is_refused_and_counted_for_its_client() -> None:
    async def story(gateway, outside, link) -> None:
        huge = PushObjectRequest(object_id="a", object_content=bytes(room.BODY))
        assert (await post(outside, "push-object", huge)).status_code == 413
        assert "push-object" not in link.calls
        part = PushObjectRequest(object_id="a", object_content=bytes(1_000_000))
        answers = [(await post(outside, "push-object", part)).status_code for _ in range(12)]
        assert answers == [200] * 9 + [413] * 3
        assert {client for _, client, _ in gateway.refused} == {0}
        assert "an update of more than 9.53674 MiB" in gateway.refused[-1][2]
        # the next message starts a new account
        link.work.append(work())
        await post(outside, "pull-messages", ASK)
        await post(outside, "confirm-message-received", ConfirmMessageReceivedRequest(message_object_id="m1"))
        assert (await post(outside, "push-object", part)).status_code == 200

    running(story)


@pytest.mark.parametrize(
    ("length", "status"),
    [(None, 411), ("", 411), ("-1", 411), ("1e3", 411), (str(room.BODY + 1), 413), ("9" * 19, 413), ("9" * 5000, 411)],
)
def test_a_body_of_no_known_or_too_large_a_size_is_refused_before_it_is_read(length, status) -> None:
    async def story(gateway, _outside, link) -> None:
        answers: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            raise AssertionError("the body is read")

        async def send(message: Any) -> None:
            answers.append(message)

        headers = signed() | ({} if length is None else {"content-length": length})
        path = "/v1/fleet/push-object"
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "scheme": "https", "client": ("10.0.0.9", 1), "server": ("10.0.0.1", 9092), "state": {},
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "asgi": {"version": "3.0"},
        }  # fmt: skip
        await gateway.app(scope, receive, send)
        assert answers[0]["status"] == status
        assert link.calls == []

    running(story)


def test_a_client_that_sends_many_bodies_at_once_is_told_to_wait() -> None:
    async def story(gateway, outside, link) -> None:
        some = PushObjectRequest(object_id="a", object_content=b"some")
        await post(outside, "push-object", some)
        gateway.nodes[0].reading = room.READING  # what its other calls are about to bring
        assert (await post(outside, "push-object", some)).status_code == 503
        gateway.nodes[0].reading = 0
        assert (await post(outside, "push-object", some)).status_code == 200
        assert gateway.nodes[0].reading == 0

    running(story)


def test_the_connection_of_who_has_signed_is_vouched_for_and_no_other() -> None:
    vouched: list[Any] = []

    async def story(_gateway, outside, _link) -> None:
        await post(outside, "get-run", headers=signed(STRANGER))
        await post(outside, "get-run", headers={})
        assert vouched == []
        await post(outside, "get-run")
        assert vouched == [(("10.0.0.9", 1234), PUBLIC)]

    running(story, vouch=lambda peer, key: vouched.append((tuple(peer), key)))


def test_bytes_that_are_no_call_are_refused() -> None:
    async def story(gateway, outside, link) -> None:
        answer = await post(outside, "pull-messages", b"\xff\xff\xff\xff")
        assert answer.status_code == 400
        assert "cannot be read" in answer.json()["error"]

    running(story)


def test_while_the_superlink_is_away_nodes_are_told_to_try_again() -> None:
    async def story(gateway, outside, link) -> None:
        def away(_request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        gateway._link._transport.handler = away
        assert (await post(outside, "get-run")).status_code == 503  # which Flower's nodes try again

    running(story)


def test_a_stranger_fills_neither_the_log_nor_the_memory(caplog) -> None:
    async def story(gateway, outside, link) -> None:
        with caplog.at_level("INFO", "test"):
            for _ in range(1200):
                await post(outside, "activate-node", headers={})
        assert len(gateway.refused) == 1000
        assert len(caplog.records) < 50

    running(story)


def test_a_node_that_asks_for_more_work_without_an_answer_has_lost_it() -> None:
    async def story(gateway, outside, link) -> None:
        link.work += [work("m1"), work("m2"), work("m3")]
        link.answers["push-messages"] = PushMessagesResponse(objects_to_push=[])
        for message, answers in (("m1", True), ("m2", False)):
            await post(outside, "pull-messages", ASK)
            await post(outside, "confirm-message-received", ConfirmMessageReceivedRequest(message_object_id=message))
            if answers:
                reply = Message(metadata=Metadata(message_id="r", reply_to_message_id=message))
                await post(outside, "push-messages", PushMessagesRequest(messages_list=[reply]))
        assert not gateway.lost
        await post(outside, "pull-messages", ASK)
        assert list(gateway.lost) == ["m2"]
        assert list(gateway.arrived) == ["m1"]

    running(story)


def test_a_call_that_the_superlink_failed_is_passed_on_again() -> None:
    async def story(gateway, outside, link) -> None:
        statuses = [500, 500, 200]

        def busy(request: httpx.Request) -> httpx.Response:
            link.status = statuses.pop(0) if statuses else 500
            return httpx.Response(link.status, content=PushObjectResponse(stored=True).SerializeToString())

        gateway._link._transport.handler = busy
        assert (await post(outside, "push-object", PushObjectRequest(object_id="a"))).status_code == 200
        assert (await post(outside, "push-object", PushObjectRequest(object_id="a"))).status_code == 503

    running(story, pauses=(0.0, 0.0))


def test_a_strangers_key_and_call_of_any_kind_are_refused_and_never_an_error_of_the_server() -> None:
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    kinds = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    unknown = b"-----BEGIN PUBLIC KEY-----\nMAoGCCqGSM49BAMCAwIAAA==\n-----END PUBLIC KEY-----\n"
    answers: list[int] = []

    async def story(_gateway, outside, _link) -> None:
        for public in (rsa_key.public_bytes(*kinds), unknown, b"", b"\xff" * 50):
            headers = signed() | {"flwr-public-key": b64encode(public).decode()}
            answers.append((await post(outside, "activate-node", b"", headers)).status_code)
        for timestamp in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01", "\u0663".encode()):
            headers = {key: value for key, value in signed().items() if key != "flwr-timestamp"}
            sent = await outside.post("/v1/fleet/activate-node", headers=headers | {"flwr-timestamp": timestamp})
            answers.append(sent.status_code)

    running(story, registry={})
    assert answers == [401] * 8


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 5000])
def test_a_call_that_is_no_message_is_the_callers_fault(body) -> None:
    async def story(_gateway, outside, link) -> None:
        link.answers["push-messages"] = PushMessagesResponse()
        for call in ("pull-messages", "push-messages", "push-object", "confirm-message-received"):
            answer = await post(outside, call, body)
            assert (call, answer.status_code) == (call, 400)

    running(story)
