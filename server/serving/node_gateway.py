"""The gateway, the only port that other machines reach: it passes on nodes' calls to Flower, for registered keys.

Flower's SuperLink serves nodes, operators and its own apps on one port, and whoever reaches the operators' part may run
code on clients. So the SuperLink stays on loopback, behind the gateway. The gateway checks each call's signature before
it passes the call on, and bounds what a node may send. It holds a node's pull until there is a message, so that nodes
need not poll every three seconds. A node that loses an answer on the way receives it again.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from logging import Logger

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import printable, reading
from fedveil.core.wire.bundle import code
from fedveil.server.flower import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ActivateNodeResponse,
    ConfirmMessageReceivedRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    PushObjectRequest,
    PushObjectResponse,
    bytes_to_public_key,
    own_replies,
    read_call,
    verify_signature,
)
from fedveil.server.serving.tokens import too_long

FLEET = "/v1/fleet/"
HELLO = "/v1/fedveil/hello"
PASSED = (
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab",
    "push-object", "pull-object", "confirm-message-received",
)  # fmt: skip
UNREGISTERED = ("register-node", "unregister-node")  # passed where any node may join, without TLS
BODY = 16 << 20  # bytes of one call; Flower cuts arrays into pieces of 5 MiB
READING = 8 * BODY  # bytes that the calls of one client may bring at the same time
HOLD = 26.0  # seconds: nodes wait 30 for any answer, and 3 more after an empty one
ARRIVED = 10_000  # replies that are remembered
AT_ONCE = 4  # calls passed on together: the SuperLink's database takes one writer
PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds
AGAIN = 5  # times that an answer is repeated for a node that does not confirm it
LOOK = 5.0  # seconds between pulls for messages that nobody announced
LISTEN = 1.0  # seconds
DEAF = 15.0  # seconds without a call of any node, though each calls every few: the server itself may be cut off
_PASSED_ON = ("content-type", "accept", "content-encoding")
_OWN = ("x-", "flwr", "user-agent")  # Flower's own headers: signatures, versions, tracing


@dataclass
class Node:
    """The gateway's record of a node.

    client: its number, by its registered key; None where any node may join
    starts: how often it joined; a node that joins again has lost its work
    seen: when it last called, seconds since the epoch; called: the same of its SuperNode alone
    given: the last message it was given and that answer, until it confirms it; again: how often it was repeated
    taken: the id of the message that it confirmed and has not answered
    held: its pulls that are held; reading: bytes of calls that are being read
    sent: bytes of objects that it sent since its last message
    sending: replies on their way: the ids of missing objects, by the id of the message they answer
    """

    client: int | None
    address: str = ""
    node_id: int = 0
    starts: int = 0
    seen: float = 0.0
    called: float = 0.0
    sent: int = 0
    given: tuple[str, bytes] | None = None
    again: int = 0
    taken: str = ""
    held: int = 0
    reading: int = 0
    sending: dict[str, set[str]] = field(default_factory=dict)
    work: asyncio.Event = field(default_factory=asyncio.Event)


class NodeGateway:
    """The gateway before a SuperLink.

    registry: public keys (PEM) of the clients that may join, with their numbers; None lets any node join
    ids: of the registered clients' nodes, by client
    limit: bytes of objects that a node may send for one message
    hold: seconds that a pull is held
    listen: seconds after which a broken connection is noticed
    pauses: seconds before a call that failed in the SuperLink is passed on again
    clock: seconds since the epoch
    vouch: receives the address and port of a connection, and the key of the client whose it turned out to be
    refused: refused calls, and why: numbered from 1, the oldest dropped
    arrived: ids of messages whose replies are complete in the SuperLink, until a run takes them; the oldest dropped
    lost: ids of messages that a node took without answering them before its next pull
    arrival: set whenever a reply has arrived
    heard, back: when any node last called, and when the first did after a silence of all, seconds since the epoch
    """

    def __init__(
        self,
        link: httpx.AsyncClient,
        registry: Mapping[bytes, int] | None,
        ids: Mapping[int, int],
        limit: int,
        log: Logger,
        *,
        hold: float = HOLD,
        listen: float = LISTEN,
        pauses: Sequence[float] = PAUSES,
        clock: Callable[[], float] = time.time,
        vouch: Callable[[tuple[str, int] | None, Hashable], None] = lambda _peer, _key: None,
    ) -> None:
        self._vouch = vouch
        self._link, self._registry, self._ids, self._limit, self._log = link, registry, ids, limit, log
        self._holding, self._listen, self._pauses, self._clock = hold, listen, pauses, clock
        self._nodes: dict[bytes, Node] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        self.refused: deque[tuple[int, int | None, str]] = deque(maxlen=1000)
        self._count = 0
        self.arrived: dict[str, None] = {}
        self.lost: dict[str, None] = {}
        self.arrival = asyncio.Event()
        self.heard = self.back = 0.0
        routes = [Route(HELLO, self._hello, methods=["POST"]), Route(FLEET + "{call}", self._pass, methods=["POST"])]
        self.app = Starlette(routes=routes, exception_handlers={404: self._closed, 405: self._closed})

    @property
    def limit(self) -> int:
        """Bytes of objects that a node may send for one message."""
        return self._limit

    @property
    def nodes(self) -> list[Node]:
        """All nodes that called since the gateway was opened."""
        return list(self._nodes.values())

    @property
    def deaf(self) -> bool:
        """Whether no node at all is heard: more likely this machine's link is down than all of theirs."""
        return bool(self._nodes) and self._clock() - self.heard > DEAF

    def wake(self, node_ids: Iterable[int]) -> None:
        """Let held pulls of nodes look for messages at once."""
        wanted = set(node_ids)
        for node in self._nodes.values():
            if node.node_id in wanted:
                node.work.set()

    async def _closed(self, request: Request, _error: Exception) -> Response:
        return self._refuse(request, None, 404, "nothing here: this port serves the clients of a federation only")

    def _refuse(self, request: Request, client: int | None, status: int, why: str) -> Response:
        self._count += 1
        self.refused.append((self._count, client, why))
        if self._count <= 20 or self._count % 100 == 0:  # strangers must not fill the disk
            who = f"client-{client + 1}" if client is not None else "a stranger"
            address = request.client.host if request.client else "?"
            self._log.info(
                "refused %s at %s, %s: %s (refusal %d)",
                *(who, address, printable(request.scope["path"], 80), why, self._count),
            )
        # do not wait for the rest of a call that is too large
        return JSONResponse({"error": why}, status, headers={"connection": "close"} if status in (411, 413) else None)

    def _known(self, request: Request) -> Node | str:
        """Return the node that signed a call, or the reason why none did."""
        try:
            with reading(ProtectionError):
                public = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
                signature = b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
                timestamp = request.headers[TIMESTAMP_HEADER]
                behind = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
        except ProtectionError:
            return "the call is not signed as a client's are"
        if self._registry is not None and public not in self._registry:
            return (
                "its key is not registered with this server; fedveil keys new makes the keys of a federation together"
            )
        try:
            with reading(ProtectionError):
                genuine = verify_signature(bytes_to_public_key(public), timestamp.encode("ascii"), signature)
        except ProtectionError:
            genuine = False
        if not genuine:
            return "its signature is not by the key that it names"
        if not -SYSTEM_TIME_TOLERANCE < behind < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            way = "behind" if behind > 0 else "ahead of"
            return (
                f"its clock is {abs(behind):.0f} s {way} the server's; {TIMESTAMP_TOLERANCE} s behind and "
                f"{SYSTEM_TIME_TOLERANCE} s ahead are allowed: set the clocks of both machines (NTP)"
            )
        node = self._nodes.get(public)
        if node is None:
            client = None if self._registry is None else self._registry[public]
            node = self._nodes[public] = Node(client, called=self._clock())
        now = node.seen = self._clock()
        if self.heard and now - self.heard > DEAF:
            self.back = now
        self.heard = now
        node.address = request.client.host if request.client else ""
        self._vouch(request.client, public)
        return node

    async def _hello(self, request: Request) -> Response:
        """Answer a client's greeting with the server's version, code and clock."""
        client, quiet = None, 0.0
        if self._registry is not None:
            node = self._known(request)
            if isinstance(node, str):
                return self._refuse(request, None, 401, node)
            client, quiet = node.client, self._clock() - node.called
        return JSONResponse({
            "fedveil": version("fedveil"), "code": code(), "client": client, "time": self._clock(), "quiet": quiet
        })  # fmt: skip

    async def _pass(self, request: Request) -> Response:
        """Pass a node's call on to the SuperLink, and return the answer."""
        call = request.path_params["call"]
        allowed = PASSED if self._registry is not None else PASSED + UNREGISTERED
        if call not in allowed:
            return await self._closed(request, LookupError(call))
        node = self._known(request)
        if isinstance(node, str):
            return self._refuse(request, None, 401, node)
        if refusal := too_long(request.headers, BODY):
            return self._refuse(request, node.client, *refusal)
        length = int(request.headers["content-length"])
        if node.reading + length > READING:
            return JSONResponse({"error": "too much at once; try again"}, 503)
        node.reading += length
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            node.reading -= length
        if call == "push-object":
            node.sent += len(body)
            if node.sent > self._limit:
                why = f"an update of more than {self._limit / 2**20:g} MiB, which fedveil server --max-update allows"
                return self._refuse(request, node.client, 413, why)
        node.called = self._clock()
        try:
            if call == "pull-messages":
                return await self._pull(request, node, body)
            if call == "push-messages" and not own_replies(body):
                return self._refuse(request, node.client, 403, "a reply in another client's name")
            if call == "activate-node" and not await self._free(request, node):
                return self._refuse(request, node.client, 409, "another client with this key is connected")
            answer = await self._forward(request.url.path, request, body)
            self._notice(call, node, body, answer)
        except ProtectionError:
            return self._refuse(request, node.client, 400, f"a call of {call} that cannot be read")
        except httpx.TransportError:
            return JSONResponse({"error": "the server is starting or stopping; try again"}, 503)
        except Exception:
            # Flower's nodes try again after 503, and give up for good after 500
            self._log.exception("a call of %s failed", call)
            return JSONResponse({"error": "the server failed; its log says where"}, 503)
        return answer

    def _notice(self, call: str, node: Node, body: bytes, answer: Response) -> None:
        """Record what a call tells of a node."""
        if answer.status_code != 200:
            if call in ("get-run", "get-fab", "pull-object"):
                node.given = None  # its run has ended
            return
        if call == "activate-node":
            node.node_id = ActivateNodeResponse.FromString(bytes(answer.body)).node_id
            node.starts += 1
            node.taken, node.given = "", None  # a restarted node has lost its work
            node.sending.clear()
        elif call == "confirm-message-received":
            confirmed = read_call(ConfirmMessageReceivedRequest, body).message_object_id
            if node.given is not None and confirmed == node.given[0]:
                node.given, node.sent = None, 0
                node.taken = confirmed
        elif call == "push-messages":
            pushed = read_call(PushMessagesRequest, body)
            missing = set(PushMessagesResponse.FromString(bytes(answer.body)).objects_to_push)
            for message in pushed.messages_list:
                node.sending[message.metadata.reply_to_message_id] = missing
            self._look(node)
        elif call == "push-object" and PushObjectResponse.FromString(bytes(answer.body)).stored:
            found = read_call(PushObjectRequest, body).object_id
            for missing in node.sending.values():
                missing.discard(found)
            self._look(node)

    def _look(self, node: Node) -> None:
        """Note the complete replies of a node."""
        for message in [message for message, missing in node.sending.items() if not missing]:
            del node.sending[message]
            node.taken = "" if message == node.taken else node.taken
            self.arrived[message] = None
            while len(self.arrived) > ARRIVED:
                del self.arrived[next(iter(self.arrived))]
            self.arrival.set()

    async def _free(self, request: Request, node: Node) -> bool:
        """Free the place of a node that joins again; return False where another connection holds it.

        Without this, a client that was killed could not join again for a minute, as Flower counts it as connected until
        then.
        """
        deadline = time.monotonic() + 3 * self._listen
        while node.held and time.monotonic() < deadline:
            await asyncio.sleep(0.1)  # a held pull notices a broken connection after `listen`
        if node.held:
            return False
        known = node.node_id or (self._ids.get(node.client) if node.client is not None else 0)
        if known:
            path, body = FLEET + "deactivate-node", DeactivateNodeRequest(node_id=known).SerializeToString()
            await self._forward(path, request, body)
        return True

    async def _pull(self, request: Request, node: Node, body: bytes) -> Response:
        """Answer a node's pull at once where there is a message, else when there is one, or empty after a while."""
        node.node_id = read_call(PullMessagesRequest, body).node.node_id
        if node.taken:  # nodes pull only after they answered the message before
            self.lost[node.taken] = None
            node.taken = ""
            self.arrival.set()
            while len(self.lost) > ARRIVED:
                del self.lost[next(iter(self.lost))]
        if node.given is not None and node.again < AGAIN:
            node.again += 1
            return Response(node.given[1], media_type="application/protobuf")
        node.held += 1
        try:
            return await self._hold(request, node, body)
        finally:
            node.held -= 1

    async def _hold(self, request: Request, node: Node, body: bytes) -> Response:
        """Hold a pull until there is a message, or the time is up."""
        deadline = time.monotonic() + self._holding
        while True:
            node.work.clear()
            answer = await self._forward(request.url.path, request, body)
            if answer.status_code != 200:
                return answer
            found = PullMessagesResponse.FromString(bytes(answer.body)).messages_list
            if found:
                node.given, node.again = (found[0].metadata.message_id, bytes(answer.body)), 0
                return answer
            again = min(time.monotonic() + LOOK, deadline)
            while not node.work.is_set() and (left := again - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(node.work.wait(), min(left, self._listen))
                if await request.is_disconnected():  # a message to a closed connection would be lost
                    return answer
            if not node.work.is_set() and time.monotonic() >= deadline:
                return answer

    async def _forward(self, path: str, request: Request, body: bytes) -> Response:
        """Return the SuperLink's answer to a call with the headers of `request`.

        The signature in the headers covers only their time, so another body may go with them.
        """
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in _PASSED_ON or (name.startswith(_OWN) and not name.startswith("x-forwarded"))
        }
        for pause in (*self._pauses, None):
            async with self._places:
                answer = await self._link.post(path, content=body, headers=headers)
            if answer.status_code != 500 or pause is None:
                break
            await asyncio.sleep(pause)  # the SuperLink's database was busy
        status = 503 if answer.status_code == 500 else answer.status_code
        return Response(answer.content, status, media_type=answer.headers.get("content-type"))
