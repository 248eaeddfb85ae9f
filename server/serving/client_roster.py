"""The nodes of a deployed run, seen as clients 0, 1, 2, ...: who is connected, their data, and who was lost.

A node's client follows from the key that the node is registered with; where any node may join, from its own answer. A
client that runs another FedVeil, has data of another kind, or whose owner's policy refuses the run takes no part, and
is named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedveil.core.errors import DeploymentError, ProtectionError
from fedveil.core.foreign import WORDS, printable, reading
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.flower import ErrorCode
from fedveil.core.wire.messages import CLIENT, CONFIG, SCHEMA, WEIGHT, from_parcel, to_parcel
from fedveil.datasets.own.local import differences
from fedveil.privacy.homomorphic.keys import fingerprint
from fedveil.server.exchange import count
from fedveil.server.nodes import WrappedGrid, addressed
from fedveil.server.serving.agreement import Agreement
from fedveil.server.serving.control_client import ControlClient, NodeEvents

HOLD = 0.5  # seconds that the control server may hold a poll
ASSEMBLY = 150.0  # seconds that a run waits for its clients to join before it begins
GREETING = 60.0  # seconds that a client may take to load its data and answer, before it is asked again
OFFLINE = 5.0  # seconds that a node may be offline without being lost
ASK_AGAIN = 15.0  # seconds after which a client that refused the run is asked again


class _Unfit(ProtectionError):
    """A client that takes no part in this run, however often it is asked."""


@dataclass
class Member:
    """A client that takes part.

    node: its id; starts: how often its node had started when it answered
    examples: that it trains on; schema: of its data (`datasets/own/local.py`)
    """

    node: int
    starts: int
    examples: int
    schema: dict[str, str]


class Parcels:
    """Messages over a grid, each as a parcel."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._sent: dict[str, Message] = {}  # messages without a reply so far, by id

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return their ids."""
        parcels = [
            Message(
                to_parcel(message.content),
                dst_node_id=message.metadata.dst_node_id,
                message_type=message.metadata.message_type,
            )
            for message in messages
        ]
        ids = list(self._grid.push_messages(parcels))
        self._sent.update(zip(ids, parcels, strict=True))
        return ids

    def pull(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that have arrived; an error in place of one that cannot be read."""
        for reply in self._grid.pull_messages(message_ids):
            asked = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                yield _opened(reply, asked)

    def give_up(self, message_id: str, why: str) -> Message:
        """Return an error in place of the reply to a message."""
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, why), reply_to=self._sent.pop(message_id))

    def forget(self, message_ids: Iterable[str]) -> None:
        """Stop waiting for the replies to these messages."""
        for message_id in message_ids:
            self._sent.pop(message_id, None)


class ClientRoster(WrappedGrid):
    """A grid where node id k+1 is client k, of the clients that take part."""

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        line: ControlClient,
        say: Callable[[str], None],
        agreement: Agreement | None = None,
        *,
        offline: float = OFFLINE,
    ) -> None:
        """Start with no clients.

        say: receives messages about clients that come, go or refuse
        agreement: the manifest that clients sign before they take part; None where they have no keys
        offline: seconds that a node may be offline without being lost
        """
        super().__init__(grid)
        self._parcels = Parcels(grid)
        self._clients, self._line, self._say = experiment.data.clients, line, say
        self._experiment, self._offline, self._agreement = experiment, offline, agreement
        self._members: dict[int, Member] = {}
        self._refusing: dict[int, tuple[int, float, str]] = {}  # by node: starts, when it was asked, why
        self._unfit: set[int] = set()  # nodes among them that would refuse again
        self._registered: dict[int, int] = {}  # clients by node; empty where any may join
        self._expected: dict[str, str] | None = None
        self._begun = False
        self._told: set[str] = set()
        self._deaf = False

    @property
    def members(self) -> dict[int, Member]:
        """The clients that take part, by number."""
        return self._members

    @staticmethod
    def called(client: int) -> str:
        """Return a client's name for people, as its folder of keys has it."""
        return f"client-{client + 1}"

    def expect(self, schema: dict[str, str]) -> None:
        """Take only clients whose data fits a schema from now on."""
        self._expected = schema

    def sizes(self, clients: Sequence[int]) -> list[int]:
        """Return the examples that each of the clients announced."""
        return [self._members[client].examples for client in clients]

    def get_node_ids(self) -> Sequence[int]:
        """Return k+1 for each client k that takes part, after a while of waiting where they are too few.

        Raise DeploymentError where they stay too few; at once, with their reasons, where so many refuse that they must.
        """
        settings = self._experiment.federation
        least = settings.quorum or (1 if self._begun else settings.cohort)
        if self._experiment.privacy.protected:
            least = max(least, self._experiment.privacy.least)
        deadline = time.monotonic() + min(ASSEMBLY, settings.deadline)
        wanted = least if self._begun else settings.cohort
        while True:
            self._muster()
            if len(self._members) >= wanted:
                break
            if time.monotonic() > deadline or self._hopeless(least, wanted):
                if len(self._members) >= least:
                    break
                raise DeploymentError(self._too_few(least))
            if not self._begun:
                self._once(f"waiting for clients: {self._present()}, {wanted} are wanted")
            time.sleep(0.2)
        if len(self._members) < settings.cohort:
            self._say(f"warning: going on with {len(self._members)} clients of {settings.cohort}: {self._present()}")
        self._begun = True
        return [client + 1 for client in sorted(self._members)]

    def _hopeless(self, least: int, wanted: int) -> bool:
        """Say whether so many clients refuse the run for good that it cannot have its fewest."""
        if self._registered:
            able = {client for client in self._registered.values() if client < self._clients}
            return len(able - {self._registered.get(node, -1) for node in self._unfit}) < least
        return len(self._members) + len(self._unfit) >= wanted

    def _present(self) -> str:
        names = ", ".join(self.called(client) for client in sorted(self._members))
        return f"there: {names}" if names else "none is there"

    def _too_few(self, least: int) -> str:
        settings = self._experiment.federation
        refusing = "".join(f"\n  {why}" for _, _, why in self._refusing.values())
        hint = (
            f"start more clients, or run with --set federation.cohort={len(self._members)} --set data.clients="
            f"{max(self._members) + 1}"
            if len(self._members) > 1 and not settings.quorum
            else "start more clients"
        )
        if self._agreement is not None and not self._agreement.settled:
            hint = f"{self._agreement}: start more clients"
        if self._unfit:
            hint = "clients that refuse take part in a run that asks for what they allow: take other settings, or ask their owners"
        return f"the run needs {least} clients, and {len(self._members)} can take part ({self._present()}){refusing}\n  {hint}"

    def _muster(self) -> None:
        """Update the clients that are connected, and ask new ones for their data's size and schema."""
        events = self._poll()
        there = set(self._grid.get_node_ids()) - events.silent
        self._registered = events.clients
        self._unfit = {node for node in self._unfit & there if self._refusing[node][0] == events.starts.get(node, 0)}
        for client, member in list(self._members.items()):
            if member.node not in there or events.starts.get(member.node, 0) != member.starts:
                del self._members[client]
                if member.node not in there:
                    self._say(f"{self.called(client)} is gone")
        known = {member.node for member in self._members.values()}
        now = time.monotonic()
        new = [
            node
            for node in sorted(there - known)
            if node not in self._refusing
            or self._refusing[node][0] != events.starts.get(node, 0)
            or now - self._refusing[node][1] > ASK_AGAIN
        ]
        if not new:
            return
        if self._agreement is not None:
            new = self._countersigned(new, events, self._agreement)
        greeting = ConfigRecord({}) if self._agreement is None else self._agreement.greeting()

        def join(node: int, reply: Message) -> None:
            client, member = self._read(reply, node, events.starts.get(node, 0), events.clients.get(node))
            self._members[client] = member
            held = "" if self._experiment.privacy.noisy else f" with {member.examples:,} examples"
            self._once(f"{self.called(client)} takes part{held}")

        content = RecordDict({CONFIG: greeting})
        self._ask([Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in new], events, join)

    def _countersigned(self, nodes: Sequence[int], events: NodeEvents, agreement: Agreement) -> list[int]:
        """Return those of some nodes whose clients signed the run's manifest, once enough clients have."""

        def sign(node: int, reply: Message) -> None:
            agreement.take(events.clients[node], reply)

        able = [node for node in nodes if node in events.clients]
        unsigned = [node for node in able if events.clients[node] not in agreement.signatures]
        self._ask([agreement.question(node) for node in unsigned], events, sign)
        if not agreement.settled:
            self._once(f"waiting for clients: {agreement}")
            return []
        self._once(f"manifest {fingerprint(agreement.manifest.digest)}, signed by more than half of all clients")
        return [node for node in able if events.clients[node] in agreement.signatures]

    def _ask(self, questions: Sequence[Message], events: NodeEvents, take: Callable[[int, Message], None]) -> None:
        """Send each node its question, and take its reply; keep the reason of each node that refuses."""
        silent = {question.metadata.dst_node_id for question in questions}
        for index, reply in self._exchange(questions, GREETING):
            node = questions[index].metadata.dst_node_id
            name = self._name(node, events)
            silent.discard(node)
            try:
                if reply.has_error():
                    kind = _Unfit if reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION else ProtectionError
                    raise kind(reply.error.reason or f"error {reply.error.code}")
                take(node, reply)
            except ProtectionError as error:
                why = printable(str(error), WORDS)
                self._refusing[node] = (events.starts.get(node, 0), time.monotonic(), f"{name}: {why}")
                (self._unfit.add if isinstance(error, _Unfit) else self._unfit.discard)(node)
                self._once(f"{name} takes no part: {why}")
                continue
            self._refusing.pop(node, None)
            self._unfit.discard(node)
        for node in silent:
            self._say(f"warning: {self._name(node, events)} has not answered within {GREETING:g} s; it is asked again")

    def _name(self, node: int, events: NodeEvents) -> str:
        client = events.clients.get(node)
        return f"node {node}" if client is None else self.called(client)

    def _read(self, reply: Message, node: int, starts: int, registered: int | None) -> tuple[int, Member]:
        """Read a client's answer; raise ProtectionError, with the reason, where it cannot take part."""
        client, examples = count(reply, CLIENT), count(reply, WEIGHT, 1)
        if registered is not None and client != registered:
            raise _Unfit(f"it calls itself {self.called(client)}")
        if client >= self._clients:
            raise _Unfit(f"its number is {client + 1}, and the run has data.clients = {self._clients}")
        if client in self._members:
            raise ProtectionError(f"{self.called(client)} is there already, from another node")
        record = reply.content.get(CONFIG)
        with reading(lambda _: ProtectionError("its answer does not say what its data is")):
            assert isinstance(record, ConfigRecord)
            schema = {str(key): str(value) for key, value in json.loads(str(record[SCHEMA])).items()}
        if self._expected is not None and (found := differences(self._expected, schema)):
            raise _Unfit("its data is of another kind: " + "; ".join(found))
        return client, Member(node, starts, examples, schema)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to messages, within `timeout` seconds; an error for a client that was lost."""
        return [reply for _, reply in self.answers(list(messages), timeout)]

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Yield replies as they arrive, each with the position of its message, for `timeout` seconds."""
        yield from self._exchange([self._addressed(message) for message in messages], timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send each message to its client, and return the ids of the messages."""
        return self._parcels.push([self._addressed(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages that have arrived."""
        return self._parcels.pull(message_ids)

    def _addressed(self, message: Message) -> Message:
        return addressed(message, self._members[message.metadata.dst_node_id - 1].node)

    def _exchange(self, sent: Sequence[Message], timeout: float | None) -> Iterator[tuple[int, Message]]:
        started = self._poll()
        waiting = {message_id: i for i, message_id in enumerate(self._parcels.push(sent))}
        nodes = [message.metadata.dst_node_id for message in sent]
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        wake: Sequence[int] = nodes
        lost_since: dict[int, float] = {}
        try:
            while waiting and time.monotonic() < deadline:
                events = self._poll(wake, waiting, HOLD)
                wake = ()
                if events.arrived:
                    for reply in self._parcels.pull(sorted(events.arrived)):
                        index = waiting.pop(reply.metadata.reply_to_message_id, None)
                        if index is not None:
                            yield index, reply
                for message_id, index in list(waiting.items()):
                    why = self._lost(nodes[index], started, events, lost_since)
                    if message_id in events.lost:
                        why = "its reply was lost on the way"
                    if why:
                        del waiting[message_id]
                        yield index, self._parcels.give_up(message_id, why)
        finally:
            self._parcels.forget(waiting)

    def _poll(self, wake: Iterable[int] = (), waiting: Iterable[str] = (), hold: float = 0.0) -> NodeEvents:
        """Return new events, and report clients that the gateway refused."""
        events = self._line.poll(wake, waiting, hold)
        for client, why in events.refused:
            if client is not None:
                self._say(f"warning: {self.called(client)} was refused: {why}")
        if events.deaf and not self._deaf:
            self._say(
                "warning: no client is heard of any more: this machine's link may be down; the run waits for them"
            )
        self._deaf = events.deaf
        return events

    def _lost(self, node: int, started: NodeEvents, events: NodeEvents, since: dict[int, float]) -> str:
        """Return the reason why no reply of a node will come; empty where one may."""
        if events.starts.get(node, 0) != started.starts.get(node, 0):
            return "it was started anew, and lost what it was working on"
        if node in events.silent:
            return "it has not been heard of for a while"
        if node in events.online:
            since.pop(node, None)
            return ""
        now = time.monotonic()
        return "its connection was lost" if now - since.setdefault(node, now) >= self._offline else ""

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


def _opened(reply: Message, asked: Message) -> Message:
    """Open the parcel of a reply; return an error where it cannot be read."""
    if reply.has_error():
        return reply
    try:
        reply.content = from_parcel(reply.content)
    except ProtectionError as error:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=asked)
    return reply
