"""The signatures of a run's manifest, as the server collects and keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedveil.core.errors import DeploymentError, ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.core.wire.messages import CONFIG, MANIFEST, SIGNATURES, from_parcel, to_parcel
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.identity import load_signer
from fedveil.privacy.trust.key_folders import IDENTITY, load_registry, new_parties
from fedveil.privacy.trust.manifest import Manifest, now, read_signatures, sign
from fedveil.server.serving.agreement import FILE, Agreement
from fedveil.server.serving.client_roster import ClientRoster, NodeEvents

EXPERIMENT = Experiment.preset("digits").override(
    {"data.clients": 3, "federation.cohort": 2, "federation.quorum": 2, "federation.deadline": 0.3}
)


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch) -> None:
    for name, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(folder, None, 3, new_parties(3, Privacy()))
    return folder


def agreement(keys: Path, **changes: Any) -> Agreement:
    registry = load_registry(keys / "server")
    assert registry is not None
    experiment = EXPERIMENT.override(changes)
    return Agreement(
        Manifest.of("ab" * 16, experiment.toml(), "", registry, reproducible=False, created=now()), registry
    )


class Nodes:
    """Nodes 101, 102, 103 of three clients; `says` replaces what one answers to the question for its signature."""

    def __init__(self, keys: Path, there: Iterable[int]) -> None:
        self.keys, self.there = keys, {101 + client: client for client in there}
        self.says: dict[int, bytes | str] = {}
        self.sent: dict[str, Message] = {}
        self.greeted: list[tuple[int, dict[str, Any]]] = []

    def poll(self, wake: Iterable[int] = (), waiting: Iterable[str] = (), hold: float = 0.0) -> NodeEvents:
        return NodeEvents(
            False, set(waiting), set(), dict(self.there), set(self.there), dict.fromkeys(self.there, 1), set(), []
        )

    def get_node_ids(self) -> list[int]:
        return list(self.there)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, ids: Iterable[str]) -> Iterable[Message]:
        for message_id in ids:
            message = self.sent[message_id]
            client = self.there[message.metadata.dst_node_id]
            config = dict(from_parcel(message.content)[CONFIG])
            if not message.metadata.message_type.endswith(MANIFEST):
                self.greeted.append((client, config))
                schema = json.dumps({"kind": "images", "classes": "0, 1", "shape": "1 x 8 x 8"})
                content = {
                    "metrics": MetricRecord({"client": client, "num-examples": 10}), CONFIG: ConfigRecord({"schema": schema}),
                }  # fmt: skip
                yield Message(to_parcel(RecordDict(content)), reply_to=message)
                continue
            told = self.says.get(client)
            if isinstance(told, str):
                yield Message(Error(5, told), reply_to=message)
                continue
            signer = load_signer(self.keys / f"client-{client + 1}" / IDENTITY)
            signature = sign(Manifest.read(config[MANIFEST]), signer) if told is None else told
            yield Message(to_parcel(RecordDict({CONFIG: ConfigRecord({SIGNATURES: signature})})), reply_to=message)


def roster(nodes: Nodes, found: Agreement) -> tuple[ClientRoster, list[str]]:
    said: list[str] = []
    return ClientRoster(nodes, EXPERIMENT, nodes, said.append, found), said  # type: ignore[arg-type]


def test_clients_are_greeted_once_more_than_half_have_signed(keys) -> None:
    nodes, found = Nodes(keys, (0, 2)), agreement(keys)
    clients, _ = roster(nodes, found)
    assert clients.get_node_ids() == [1, 3]
    assert sorted(found.signatures) == [0, 2]
    for _client, config in nodes.greeted:
        assert config[MANIFEST] == found.manifest.content
        assert read_signatures(config[SIGNATURES]) == found.signatures


def test_with_too_few_signatures_nobody_is_greeted_and_the_error_says_why(keys) -> None:
    nodes = Nodes(keys, (1,))
    clients, said = roster(nodes, agreement(keys))
    with pytest.raises(DeploymentError, match="1 of 3 registered clients signed the run's manifest, and 2 are needed"):
        clients.get_node_ids()
    assert nodes.greeted == []
    assert any("signed the run's manifest" in line for line in said)


def test_a_client_that_refuses_or_signs_something_else_is_left_out_and_one_that_comes_late_signs_too(keys) -> None:
    nodes, found = Nodes(keys, (0, 1, 2)), agreement(keys)
    nodes.says = {1: b"\x30\x02nonsense"}
    clients, said = roster(nodes, found)
    assert clients.get_node_ids() == [1, 3]
    assert any("client-2 takes no part: client-2's signature is not of this manifest" in line for line in said)
    later = Nodes(keys, (0, 2))
    clients, _ = roster(later, found)
    clients.get_node_ids()
    later.there[102] = 1
    assert clients.get_node_ids() == [1, 2, 3]
    assert sorted(found.signatures) == [0, 1, 2]


def test_the_record_has_the_manifest_and_its_signatures_and_a_resumed_run_goes_on_with_them(keys, tmp_path) -> None:
    nodes, found = Nodes(keys, (0, 1)), agreement(keys)
    clients, _ = roster(nodes, found)
    clients.get_node_ids()
    found.keep(tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["manifest"]["experiment"] == EXPERIMENT.toml()
    assert sorted(kept["signatures"]) == ["0", "1"]
    again = agreement(keys)
    resumed = Agreement.resume(tmp_path, again.manifest.model_copy(update={"run": "cd" * 16}), again._registry)
    assert resumed is not None
    assert resumed.manifest == found.manifest
    assert resumed.signatures == found.signatures
    assert Agreement.resume(tmp_path / "nowhere", again.manifest, again._registry) is None


def test_a_run_does_not_go_on_with_other_settings_than_were_signed_or_a_damaged_manifest(keys, tmp_path) -> None:
    found = agreement(keys)
    found.keep(tmp_path)
    other = agreement(keys, **{"training.epochs": 7})
    with pytest.raises(DeploymentError, match=r"training\.epochs is 5 in the manifest and 7 here"):
        Agreement.resume(tmp_path, other.manifest, other._registry)
    kept = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(kept)[:-20])
    with pytest.raises(DeploymentError, match=r"manifest\.json: is damaged"):
        Agreement.resume(tmp_path, found.manifest, found._registry)
    (tmp_path / FILE).write_text(json.dumps({**kept, "signatures": {"0": "00"}}))
    with pytest.raises(ProtectionError, match="client-1's signature"):
        Agreement.resume(tmp_path, found.manifest, found._registry)
