"""The trainer: answers messages with the installed app, and keeps to itself what is this client's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedveil.client.node.trainer import ClientProfile, TrainerReply, TrainerRequest, answer, command, reply_to
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.subprocesses import Child, wait_for
from fedveil.core.wire.messages import REFUSED, from_parcel, to_arrays, to_parcel
from fedveil.datasets.federated import load
from fedveil.models.computing import one_thread
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy

SETTINGS = Experiment.preset("digits").override({"data.clients": 3, "federation.cohort": 3, "federation.rounds": 2})
RATE = {"server-round": 1, "learning-rate": 0.1}


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch) -> None:
    for name, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def request(kind: str, config: dict[str, Any], experiment: Experiment = SETTINGS, **others: Any) -> TrainerRequest:
    """A message of a server, with its model."""
    network = build(load(SETTINGS.data, 0).dataset.task, SETTINGS.model, Stream(0))
    content = {"arrays": to_arrays(to_numpy(get(network))), "config": ConfigRecord(config)}
    parcel = to_parcel(RecordDict({**content, **others}))
    message = Message(parcel, dst_node_id=7, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m1"
    return TrainerRequest(message, RecordDict(), {"experiment": experiment.toml(), "words": ""}, 1, 7)


PROFILE = ClientProfile(1, "digits:2/3")


def test_the_operator_is_told_what_the_client_did() -> None:
    assert answer(request(MessageType.QUERY, {}), PROFILE).did == "digits  takes part, for 2 rounds"
    did = answer(request(MessageType.TRAIN, RATE), PROFILE).did
    assert re.fullmatch(r"round 1  trained on 479 examples in \d+\.\d s  loss \d\.\d{4}", did)
    assert answer(request(MessageType.TRAIN, {}), PROFILE).did == ""  # refused


def test_training_that_may_repeat_is_training_in_a_simulation(tmp_path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('reproducible = "allow"\n')
    asked = request(MessageType.TRAIN, RATE)
    asked.run_config["reproducible"] = "yes"
    refused = answer(asked, PROFILE)
    assert refused.error[1] == "this client's policy refuses reproducible"
    asked = request(MessageType.TRAIN, RATE)
    asked.run_config["reproducible"] = "yes"
    outcome = answer(asked, replace(PROFILE, policy=str(policy)))
    assert outcome.error == (0, "")
    content = from_parcel(outcome.content)  # type: ignore[arg-type]
    assert content["metrics"]["client"] == 1
    from fedveil.client.learning.contribution import Contributions, Instructions
    from fedveil.client.learning.local import train
    from fedveil.client.learning.runtime import client_runtime

    runtime = client_runtime(SETTINGS.toml())
    given = to_numpy(get(build(runtime.federated.dataset.task, SETTINGS.model, Stream(0))))
    expected = Contributions([1], Instructions.read(RATE, SETTINGS), given)
    with one_thread():  # as clients compute
        train(runtime, expected)
    for name, array in content["arrays"].items():
        assert np.array_equal(array.numpy(), expected.of(0)[name])


def test_training_draws_what_nobody_can_repeat_unless_it_is_asked_to() -> None:
    """Without dropout and augmentation, the order of the examples alone makes two answers differ."""
    sent = [from_parcel(answer(request(MessageType.TRAIN, RATE), PROFILE).content)["arrays"] for _ in range(2)]  # type: ignore[arg-type]
    assert any(not np.array_equal(array.numpy(), sent[1][name].numpy()) for name, array in sent[0].items())


def test_hello_says_what_the_client_brings_and_nothing_of_its_data() -> None:
    outcome = answer(request(MessageType.QUERY, {}), PROFILE)
    content = from_parcel(outcome.content)  # type: ignore[arg-type]
    assert set(content) == {"metrics", "config"}
    assert set(content["metrics"]) == {"client", "num-examples"}
    assert set(json.loads(content["config"]["schema"])) == {"kind", "classes", "shape"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"server-round": 3, "learning-rate": 0.1}, "round 3 of a run with federation.rounds = 2"),
        ({"server-round": 1}, "no number 'learning-rate'"),
        ({"server-round": 1, "learning-rate": float("nan")}, "no number 'learning-rate'"),
        ({"learning-rate": 0.1}, "no number 'server-round'"),
    ],
)
def test_what_a_server_may_not_ask_is_refused_and_why_is_said_on_this_side_alone(changed, said) -> None:
    outcome = answer(request(MessageType.TRAIN, changed), PROFILE)
    assert outcome.content is None
    assert outcome.error[1] == REFUSED
    assert any(said in text for text in outcome.said)


def test_a_message_without_a_model_or_that_is_no_parcel_is_refused() -> None:
    bare = request(MessageType.TRAIN, RATE)
    bare.message.content = to_parcel(RecordDict({"config": ConfigRecord(RATE), "arrays": ConfigRecord({})}))
    outcome = answer(bare, PROFILE)
    assert outcome.error[1] == REFUSED
    assert "no ArrayRecord 'arrays'" in outcome.said[0]
    bare.message.content = RecordDict({"config": ConfigRecord(RATE), "arrays": ArrayRecord()})
    outcome = answer(bare, PROFILE)
    assert outcome.error[1] == REFUSED
    assert "no parcel" in outcome.said[0]


def test_data_that_does_not_fit_is_named_to_the_client_alone(tmp_path) -> None:
    path = tmp_path / "private-name.csv"
    path.write_text("label,text\nham,my secret words\nodd-label,hello\n")
    spam = Experiment.preset("spam-demo").override({"data.vocabulary": "hashed"})
    outcome = answer(request(MessageType.QUERY, {}, spam), ClientProfile(0, str(path)))
    assert outcome.error[1] == REFUSED
    assert any("odd-label" in text and "private-name.csv" in text for text in outcome.said)


def test_a_fault_of_the_app_tells_the_server_nothing_that_it_quotes(monkeypatch, capsys) -> None:
    import fedveil.client.app as app

    def broken(*_given: Any, **_others: Any) -> None:
        raise ValueError("row 7: my secret words")

    monkeypatch.setattr(app, "contribute", broken)
    outcome = answer(request(MessageType.TRAIN, RATE), PROFILE)
    assert outcome.error[1] == "its app failed; its own log says where"
    assert "my secret words" in capsys.readouterr().err


def test_a_policy_is_asked_before_any_data_is_read(tmp_path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max_rounds = 1\n")
    outcome = answer(request(MessageType.QUERY, {}), ClientProfile(1, str(tmp_path / "gone.csv"), "", str(policy)))
    assert outcome.error[1] == "this client's policy refuses federation.rounds"
    assert "this client's policy refuses the run: federation.rounds = 2" in outcome.said[0]


def test_a_trainer_process_answers_over_its_line_and_ends_when_it_is_closed(tmp_path) -> None:
    ours, theirs = Pipe()
    with theirs:
        child = Child("trainer", command(theirs.fileno(), PROFILE), tmp_path / "t.log", pass_fds=(theirs.fileno(),))
    wait_for(lambda: ours.poll(0) and ours.recv() == "ready", child, 60, "the trainer")
    ours.send(request(MessageType.QUERY, {}))
    outcome = ours.recv()
    assert isinstance(outcome, TrainerReply)
    message = request(MessageType.QUERY, {}).message
    assert reply_to(message, outcome).has_content()
    assert reply_to(message, TrainerReply(None, (3, "no"), RecordDict())).error.reason == "no"
    ours.close()
    assert child.process.wait(30) == 0
