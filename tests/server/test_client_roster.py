"""Clients on separate machines as the round loop sees them, over a grid and a control server that are fakes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedveil.core.errors import DeploymentError, Interrupted
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.flower import ErrorCode
from fedveil.core.wire.messages import from_parcel, to_parcel
from fedveil.server.serving import client_roster
from fedveil.server.serving.client_roster import OFFLINE, ClientRoster, NodeEvents

SCHEMA = {"kind": "images", "classes": "0, 1", "shape": "1 x 8 x 8"}
NO_PARCEL = object()
SETTINGS = {"data.clients": 4, "federation.cohort": 3, "federation.deadline": 0.3}


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch) -> None:
    """Flower's messages ask which run they are of."""
    for name, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


class Machines:
    """Nodes 101, 102, ... of clients 0, 1, ...: a grid, and the line to the control server, in one."""

    def __init__(self, clients: int) -> None:
        self.there = {101 + client: client for client in range(clients)}
        self.registered = dict(self.there)
        self.starts: dict[int, int] = dict.fromkeys(self.there, 1)
        self.says: dict[int, Any] = {}  # by node: what it answers to a first question, beside the usual
        self.mute: set[int] = set()
        self.offline: set[int] = set()
        self.refused: list[tuple[int | None, str]] = []
        self.stop = False
        self.lost: set[str] = set()
        self.sent: dict[str, Message] = {}
        self.woken: list[int] = []
        self.asked = 0

    def poll(self, wake: Iterable[int] = (), waiting: Iterable[str] = (), hold: float = 0.0) -> NodeEvents:
        if self.stop:
            raise Interrupted("the run was stopped")
        self.woken += list(wake)
        here = {m for m in waiting if self.sent[m].metadata.dst_node_id not in self.mute}
        refused, self.refused = self.refused, []
        return NodeEvents(
            False,
            here,
            self.lost & set(waiting),
            self.registered,
            set(self.there) - self.offline,
            dict(self.starts),
            set(),
            refused,
        )

    def get_node_ids(self) -> Iterable[int]:
        return list(self.there)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        ids = []
        for message in messages:
            self.asked += 1
            ids.append(f"m{self.asked}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, ids: Iterable[str]) -> Iterable[Message]:
        for message_id in ids:
            message = self.sent[message_id]
            node = message.metadata.dst_node_id
            told = self.says.get(node, {})
            if told is NO_PARCEL:
                yield Message(RecordDict({"metrics": MetricRecord({"client": 0})}), reply_to=message)
                continue
            if isinstance(told, str | Error):
                yield Message(Error(0, told) if isinstance(told, str) else told, reply_to=message)
                continue
            metrics = {"client": self.there[node], "num-examples": 10 + self.there[node]} | told
            schema = metrics.pop("schema", SCHEMA)
            content = {"metrics": MetricRecord(metrics), "config": ConfigRecord({"schema": json.dumps(schema)})}
            yield Message(to_parcel(RecordDict(content)), reply_to=message)


def roster_of(machines: Machines, offline: float = OFFLINE, **settings: Any) -> tuple[ClientRoster, list[str]]:
    """A roster over fakes, and what it says."""
    said: list[str] = []
    experiment = Experiment.preset("digits").override(SETTINGS | settings)
    return ClientRoster(machines, experiment, machines, said.append, offline=offline), said  # type: ignore[arg-type]


def training(roster: ClientRoster) -> list[Message]:
    """A message to every client that is there."""
    return [
        Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=node, message_type=MessageType.TRAIN)
        for node in roster.get_node_ids()
    ]


def test_clients_are_who_their_keys_say_in_their_order() -> None:
    machines = Machines(3)
    machines.there = {103: 0, 101: 1, 102: 2}
    machines.registered = dict(machines.there)
    roster, said = roster_of(machines)
    assert roster.get_node_ids() == [1, 2, 3]
    assert roster.sizes([2, 0]) == [12, 10]
    assert {client: member.node for client, member in roster.members.items()} == {0: 103, 1: 101, 2: 102}
    assert "client-3 takes part with 12 examples" in said
    assert machines.asked == 3
    assert roster.get_node_ids() == [1, 2, 3]
    assert machines.asked == 3  # nobody is asked again


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("its data does not fit the run", "its data does not fit the run"),
        (NO_PARCEL, "no parcel of FedVeil"),
        ({"client": 1}, "it calls itself client-2"),
        ({"client": -1}, "client = -1"),
        ({"num-examples": 0}, "num-examples = 0"),
        ({"num-examples": 2.5}, "num-examples = 2.5"),
        ({"schema": {**SCHEMA, "classes": "0, 1, 2"}}, "classes: 0, 1 here, 0, 1, 2 there"),
        ({"schema": [1]}, "does not say what its data is"),
    ],
    ids=["refusal", "no-parcel", "other-number", "negative", "none", "half", "classes", "no-schema"],
)
def test_who_cannot_take_part_is_named_with_the_reason_and_left_out(told, why) -> None:
    machines = Machines(4)
    machines.says[101] = told
    roster, said = roster_of(machines)
    roster.expect(SCHEMA)
    assert roster.get_node_ids() == [2, 3, 4]
    (line,) = [text for text in said if "takes no part" in text]
    assert line.startswith("client-1 takes no part: ")
    assert why in line
    roster.get_node_ids()
    assert machines.asked == 4  # it is not asked every round
    machines.says.pop(101)
    machines.starts[101] += 1  # its operator mended it
    assert roster.get_node_ids() == [1, 2, 3, 4]


def test_a_number_beyond_the_settings_takes_no_part() -> None:
    roster, said = roster_of(Machines(4), **{"data.clients": 3})
    assert roster.get_node_ids() == [1, 2, 3]
    assert any("its number is 4, and the run has data.clients = 3" in text for text in said)


def test_a_run_that_asks_for_more_than_are_there_says_so_and_what_would_do() -> None:
    machines = Machines(2)
    machines.says[102] = "no"
    roster, _ = roster_of(machines)
    with pytest.raises(DeploymentError) as error:
        roster.get_node_ids()
    assert "needs 3 clients, and 1 can take part (there: client-1)" in str(error.value)
    assert "client-2: no" in str(error.value)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("unfit", [Error(ErrorCode.MOD_FAILED_PRECONDITION, "its policy refuses"), {"client": 9}])
def test_a_run_that_too_many_refuse_for_good_ends_at_once_with_their_reasons(registered, unfit) -> None:
    machines = Machines(4)
    machines.registered = machines.registered if registered else {}
    machines.says |= {101: unfit, 103: unfit}
    roster, _ = roster_of(machines, **{"federation.deadline": 1e6})  # nobody waits for it
    with pytest.raises(DeploymentError) as error:
        roster.get_node_ids()
    told = str(error.value)
    why = "its policy refuses" if isinstance(unfit, Error) else "number is 10" if not registered else "calls itself"
    assert told.count(why) == 2
    assert "start more clients" not in told
    assert "take other settings, or ask their owners" in told


def test_a_run_waits_for_registered_clients_that_may_still_come_where_others_refuse() -> None:
    machines = Machines(4)
    del machines.there[104]
    machines.says[101] = Error(ErrorCode.MOD_FAILED_PRECONDITION, "no")
    roster, said = roster_of(machines, **{"federation.deadline": 60.0})
    joining = threading.Timer(0.5, lambda: machines.there.update({104: 3}))
    joining.start()
    assert roster.get_node_ids() == [2, 3, 4]
    assert any("waiting for clients" in text for text in said)


def test_a_client_whose_trainer_died_is_asked_again_and_ends_no_run(monkeypatch) -> None:
    monkeypatch.setattr(client_roster, "ASK_AGAIN", 0.1)
    machines = Machines(3)
    machines.says[101] = Error(ErrorCode.INVALID_FAB, "the client's trainer died over this message")
    roster, _ = roster_of(machines, **{"federation.deadline": 60.0})
    mending = threading.Timer(0.5, lambda: machines.says.pop(101))
    mending.start()
    assert roster.get_node_ids() == [1, 2, 3]


def test_later_rounds_go_on_with_those_that_are_left_down_to_the_quorum() -> None:
    machines = Machines(3)
    roster, said = roster_of(machines, **{"federation.quorum": 2})
    assert roster.get_node_ids() == [1, 2, 3]
    del machines.there[102]
    assert roster.get_node_ids() == [1, 3]
    assert "client-2 is gone" in said
    assert any(text.startswith("warning: going on with 2 clients of 3") for text in said)
    del machines.there[101]
    with pytest.raises(DeploymentError, match="needs 2 clients, and 1 can take part"):
        roster.get_node_ids()


def test_a_protected_round_never_has_fewer_than_its_least() -> None:
    machines = Machines(4)
    roster, _ = roster_of(machines, **{"privacy.protection": "bfv", "federation.cohort": 4})
    assert len(roster.get_node_ids()) == 4
    del machines.there[101], machines.there[102]
    with pytest.raises(DeploymentError, match="needs 3 clients, and 2 can take part"):
        roster.get_node_ids()


def test_replies_come_with_their_clients_and_nodes_are_woken() -> None:
    machines = Machines(3)
    roster, _ = roster_of(machines)
    messages = training(roster)
    machines.woken.clear()
    found = {index: reply.metadata.src_node_id for index, reply in roster.answers(messages, 5)}
    assert found == {0: 101, 1: 102, 2: 103}
    assert machines.woken == [101, 102, 103]


@pytest.mark.parametrize(
    ("happen", "why"),
    [
        (lambda machines: machines.starts.update({102: 2}), "it was started anew"),
        (lambda machines: machines.offline.add(102), "its connection was lost"),
        (lambda machines: machines.lost.update(machines.sent), "its reply was lost on the way"),
    ],
    ids=["restarted", "offline", "lost"],
)
def test_a_client_that_was_lost_ends_the_wait_for_it(happen, why) -> None:
    machines = Machines(3)
    roster, _ = roster_of(machines, offline=0.0)
    messages = training(roster)
    machines.mute.add(102)
    found = {}
    for index, reply in roster.answers(messages, 30):
        found[index] = reply
        happen(machines)
    assert found[1].has_error()
    assert why in found[1].error.reason
    assert not found[0].has_error()
    assert not found[2].has_error()


def test_who_never_answers_is_waited_for_until_the_deadline_alone() -> None:
    machines = Machines(3)
    roster, _ = roster_of(machines)
    messages = training(roster)
    machines.mute.add(103)
    assert [index for index, _ in roster.answers(messages, 0.2)] == [0, 1]


def test_a_stop_ends_the_wait() -> None:
    machines = Machines(3)
    roster, _ = roster_of(machines)
    messages = training(roster)
    machines.mute.update(machines.there)
    answers = roster.answers(messages, 30)
    machines.stop = True
    with pytest.raises(Interrupted):
        next(answers)


def test_what_the_gate_refused_of_a_client_is_said_with_its_name() -> None:
    machines = Machines(3)
    roster, said = roster_of(machines)
    messages = training(roster)
    machines.refused = [(1, "an update of more than 512 MiB"), (None, "not signed")]
    list(roster.answers(messages, 5))
    list(roster.answers(messages, 5))
    assert [text for text in said if "refused" in text] == [
        "warning: client-2 was refused: an update of more than 512 MiB"
    ]


def test_every_way_of_sending_goes_as_parcels_and_no_message_is_kept() -> None:
    machines = Machines(3)
    roster, _ = roster_of(machines)
    replies = list(roster.send_and_receive(training(roster), timeout=5))
    ids = list(roster.push_messages(training(roster)))
    replies += roster.pull_messages(ids)
    assert [reply.content["metrics"]["client"] for reply in replies] == [0, 1, 2, 0, 1, 2]
    assert [from_parcel(machines.sent[message_id].content)["config"]["client"] for message_id in ids] == [0, 1, 2]
    machines.mute.add(103)
    assert len(list(roster.send_and_receive(training(roster), timeout=0.2))) == 2
    assert roster._parcels._sent == {}
