"""A server that asks to learn from answers: a client's replies name nothing of its owner's, its refusals no reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from trust.liar import DeployedClient

from fedveil import Experiment
from fedveil.client.node.trainer import ClientProfile, TrainerReply
from fedveil.core.examples import Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Privacy
from fedveil.core.wire.messages import CONFIG, METRICS, REFUSED, SCHEMA, from_parcel
from fedveil.datasets.own.local import differences, schema
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import new_parties

# what a server must read nowhere: names of files and folders, columns, values, the owner's limits and notes
PRIVATE = ("private-", "hiv_status", "prior_convictions", "ONCO-17", "top secret", "ward-7", "4711")
COLUMNS = ("hiv_status", "age", "prior_convictions")
RATE = {"server-round": 1, "learning-rate": 0.1}
OWN = Experiment.preset("digits").override(
    {
        "data.clients": 3, "federation.cohort": 3, "federation.rounds": 1, "training.epochs": 1, "model.hidden": [4],
        "data.dataset": "own", "data.labels": ["0", "1"],
    }
)  # fmt: skip

EVALUATED = OWN.override({"data.validation_fraction": 0.2, "evaluation.federated": True})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A client's folder: its data and, in some of them, a private value where none fits."""
    folder = tmp_path / "private-folder"
    folder.mkdir()
    header = ",".join(("label", *COLUMNS))
    rows = [f"{i % 2},{i % 3},{i / 20},{i % 5}" for i in range(20)]
    (folder / "private-table.csv").write_text("\n".join([header, *rows]))
    (folder / "private-odd.csv").write_text("\n".join([header, *rows, "ward-7,1,1,1"]))
    (folder / "private-broken.csv").write_text("\n".join([header, *rows, "1,4711"]))
    return folder


def client(home: Path, data: str = "private-table.csv", policy: str | None = None, keys: str = "") -> DeployedClient:
    if policy is not None:
        (home / "private-policy.toml").write_text(policy)
    rules = "" if policy is None else str(home / "private-policy.toml")
    return DeployedClient(ClientProfile(0, str(home / data), keys, rules), {"experiment": OWN.toml()})


def model(experiment: Experiment = OWN) -> dict[str, np.ndarray]:
    return to_numpy(get(build(Task("features", (3,), ("0", "1")), experiment.model, Stream(0))))


def told(outcome: TrainerReply) -> str:
    """All that a server reads of an answer, as text."""
    if outcome.content is None:
        return outcome.error[1]
    content = from_parcel(outcome.content)
    return repr({key: list(value) if isinstance(value, ArrayRecord) else dict(value) for key, value in content.items()})


def is_private(outcome: TrainerReply) -> list[str]:
    return [word for word in PRIVATE if word in told(outcome)]


def test_hello_tells_the_columns_by_their_hash_and_the_owner_by_their_names(home: Path) -> None:
    outcome = client(home).reply("query")
    assert outcome.content is not None
    assert is_private(outcome) == []
    found = json.loads(from_parcel(outcome.content)[CONFIG][SCHEMA])  # type: ignore[arg-type, call-overload, index]
    assert set(found) == {"kind", "classes", "shape", "columns"}
    assert found["columns"].startswith("SHA-256 ")
    assert any(", ".join(COLUMNS) in text for text in outcome.said)


def test_columns_in_another_order_or_of_another_name_differ_still() -> None:
    task = Task("features", (3,), ("0", "1"))
    one = schema(task, None, COLUMNS)
    assert differences(one, schema(task, None, list(COLUMNS))) == []
    for others in (COLUMNS[::-1], (*COLUMNS[:2], "height"), ("hiv_status, age", "prior_convictions", "x")):
        (line,) = differences(one, schema(task, None, others))
        assert line.startswith("columns: SHA-256 ")


def test_honest_work_names_nothing_of_the_owners(home: Path) -> None:
    asked = client(home)
    trained = asked.reply("train", model(), RATE)
    assert trained.content is not None
    assert set(from_parcel(trained.content)[METRICS]) == {"client", "num-examples", "seconds", "steps", "train-loss"}
    evaluated = asked.reply("evaluate", model(), {"server-round": 1}, experiment=EVALUATED.toml())
    assert evaluated.content is not None
    assert is_private(trained) == is_private(evaluated) == []


def test_a_client_with_noise_tells_its_update_and_no_loss_or_count(home: Path) -> None:
    noisy = OWN.override({"privacy.clip": 1.0, "privacy.noise_multiplier": 1.0})
    outcome = client(home).reply("train", model(), RATE, experiment=noisy.toml())
    assert outcome.content is not None
    metrics = from_parcel(outcome.content)[METRICS]
    assert set(metrics) == {"client", "num-examples", "seconds"}
    assert metrics["num-examples"] == 1  # type: ignore[call-overload, index]


ASKED: dict[str, tuple[dict[str, str], dict[str, Any], str, Mapping[str, Any]]] = {
    # the client's folder, the settings of the run, the kind of message, its config
    "a policy with a wrong value": ({"policy": 'max_rounds = "top secret value"\n'}, {}, "query", {}),
    "a policy that is no TOML": ({"policy": "min_clients = = 3 # study ONCO-17\n"}, {}, "query", {}),
    "a policy with an unknown key": ({"policy": "ONCO-17 = 3\n"}, {}, "query", {}),
    "a label of the data": ({"data": "private-odd.csv"}, {}, "query", {}),
    "a broken line of the data": ({"data": "private-broken.csv"}, {}, "query", {}),
    "data that is gone": ({"data": "private-gone.csv"}, {}, "query", {}),
    "a column that is not there": ({}, {"data.label_column": "wealth"}, "query", {}),
    "values beyond any scale": ({}, {"data.scale": "standard"}, "query", {}),
    "a network of millions": ({"policy": "max_weights = 4711\n"}, {"model.hidden": [5000]}, "query", {}),
    "keys that are not there": ({"keys": "private-keys"}, {"privacy.protection": "secagg"}, "train", {
        **RATE, "run": bytes(16), "attempt": 0, "reference-examples": 60,
    }),
    "a protection without keys": ({}, {"privacy.protection": "ckks"}, "train", RATE),
    "a round beyond the run": ({}, {}, "train", {"server-round": 2, "learning-rate": 0.1}),
    "no learning rate": ({}, {}, "train", {"server-round": 1}),
    "weights that float16 cannot hold": ({}, {"communication.encoding": "float16"}, "train", {
        "server-round": 1, "learning-rate": 1e9,
    }),
}  # fmt: skip


@pytest.mark.parametrize("what", ASKED)
def test_a_refusal_tells_the_server_no_reason_and_the_owner_all(home: Path, what: str) -> None:
    folder, settings, kind, config = ASKED[what]
    if "keys" in folder:
        folder = {**folder, "keys": str(home / folder["keys"])}
    asked = client(home, **folder)
    outcome = asked.reply(kind, model() if kind == "train" else None, config, experiment=OWN.override(settings).toml())
    assert outcome.content is None
    assert outcome.error[1] == REFUSED
    assert any(text.startswith("refused: ") and len(text) > 30 for text in outcome.said)


def test_an_update_that_the_owners_guard_keeps_back_is_not_described(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.client.learning.transforms.reveals", lambda *_given: SimpleNamespace(anything=True))
    outcome = client(home, policy='leak_guard = "refuse"\n').reply("train", model(), RATE)
    assert outcome.error[1] == REFUSED
    assert any("the client's own guard kept its update back" in text for text in outcome.said)


def test_a_run_without_the_manifest_that_keys_ask_for_is_refused_without_a_reason(home: Path) -> None:
    keys = home / "private-keys"
    privacy = Privacy(protection="secagg")  # type: ignore[arg-type]
    write_keys(keys, None, 3, new_parties(3, privacy, ["localhost"]))
    outcome = client(home, keys=str(keys / "client-1")).reply("query")
    assert outcome.error[1] == REFUSED
    assert any("manifest" in text for text in outcome.said)


def test_a_policy_names_the_settings_that_it_refuses_and_none_of_its_limits(home: Path) -> None:
    policy = 'max_rounds = 1\nmin_noise = 47.11\nmin_clients = 13\nprotections = ["bfv"]\nmodels = ["lstm"]\n'
    outcome = client(home, policy=policy).reply("query", experiment=OWN.override({"federation.rounds": 2}).toml())
    assert outcome.error[1] == (
        "this client's policy refuses privacy.protection, privacy.noise_multiplier, model.name, federation.rounds"
    )
    assert any("it allows 47.11 or more (min_noise)" in text for text in outcome.said)


def test_a_model_of_another_shape_or_no_message_at_all_breaks_nothing_and_tells_nothing(home: Path) -> None:
    asked = client(home)
    other = {name: np.zeros((2, 2), np.float32) for name in model()}
    outcome = asked.reply("train", other, RATE)
    assert outcome.content is None
    assert outcome.error[1] in (REFUSED, "its app failed; its own log says where")
    outcome = asked.reply("train", config=RATE)
    assert outcome.error[1] == REFUSED
    outcome = asked.reply("train", model(), RATE, experiment="private = [")
    assert outcome.error[1] == REFUSED


def test_a_message_that_is_no_parcel_tells_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trust.liar.to_parcel", lambda _content: RecordDict({"x": ConfigRecord({"y": b"z"})}))
    outcome = client(home).reply("query")
    assert outcome.error[1] == REFUSED
    assert any("no parcel of FedVeil" in text for text in outcome.said)
