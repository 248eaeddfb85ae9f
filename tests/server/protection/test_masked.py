"""Secure aggregation whose server may lie: signed keys and confirmed survivors, on Flower's messages, through the round loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord

from fedveil import Experiment
from fedveil.client.app import app
from fedveil.core.errors import ProtectionError, TrainingError
from fedveil.core.record.record import Record
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import REGISTRY, new_parties
from fedveil.server.federation import Federation, federate, prepare, resolve
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.engine.grid import InProcessGrid

SETTINGS = {
    "privacy.protection": "secagg", "federation.rounds": 2, "data.clients": 5, "federation.cohort": 5, "model.hidden": [8],
    "training.epochs": 1,
}  # fmt: skip


def ready() -> Federation:
    """A secure aggregation of the digits over five clients."""
    experiment = Experiment.preset("digits").override(SETTINGS)
    return prepare(resolve(experiment).override({"engine": "sequential"}))


def play(federation: Federation, folder: Path, keys: Path | None, grid: type[InProcessGrid] = InProcessGrid) -> Record:
    """Run it; `keys`: the folder of all parties' keys."""
    federation.protect(None if keys is None else keys / "server")
    record = Record.create(federation.experiment, folder)
    config = {"experiment": federation.experiment.toml(), "keys": "" if keys is None else str(keys)}
    federate(federation, grid(app, 5, config), record, Hooks(lambda _row, _state: None, federation.evaluate))
    return record


@pytest.fixture
def keys(tmp_path) -> Path:
    folder = tmp_path / "keys"
    write_keys(folder, None, 5, new_parties(5, ready().experiment.privacy))
    return folder


def stages(record: Record) -> set[str]:
    """The stages whose messages a record accounts for."""
    return {line.split(",")[1] for line in record.path("ledger.csv").read_text().splitlines()[1:]}


def test_registered_keys_add_a_stage_and_give_the_same_model(keys, tmp_path) -> None:
    trusting = play(ready(), tmp_path / "trusting", None)
    wary = play(ready(), tmp_path / "wary", keys)
    assert wary.sha256("model.safetensors") == trusting.sha256("model.safetensors")
    assert stages(wary) - stages(trusting) == {"confirm"}


def test_a_client_whose_key_is_another_one_is_left_out_by_name(keys, tmp_path) -> None:
    stranger = tmp_path / "other"
    write_keys(stranger, None, 5, new_parties(5, ready().experiment.privacy))
    (keys / "client-2" / "identity.key").write_bytes((stranger / "client-2" / "identity.key").read_bytes())
    record = play(ready(), tmp_path / "run", keys)
    ledger = record.path("ledger.csv").read_text()
    assert "client 1, adverts: not signed by its registered key" in ledger
    assert record.path("metrics.csv").read_text().splitlines()[2].split(",")[2] == "4"


def test_clients_with_registered_keys_refuse_a_server_without(keys, tmp_path) -> None:
    (keys / "server" / REGISTRY).unlink()
    with pytest.raises(ProtectionError, match=r"round 1: .*adverts came from 0 of 5 clients"):
        play(ready(), tmp_path / "run", keys)


class Lying(InProcessGrid):
    """A server that shows every client but the first another training message."""

    change: Callable[[ConfigRecord], None]

    def answers(self, messages, timeout=None):
        for message in messages:
            if message.metadata.message_type == "train" and message.metadata.dst_node_id > 1:
                config = ConfigRecord(dict(message.content["config"]))
                type(self).change(config)
                message.content["config"] = config
        return super().answers(messages, timeout)


SIGNED = r"nothing was revealed[\s\S]*it signed something else than the list of survivors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference-examples": 10_000}, SIGNED),
        ({"reference-examples": 2**60}, "it would be rounded away"),
        ({"learning-rate": 1e-30}, SIGNED),
    ],
    ids=["n_ref", "huge n_ref", "rate"],
)
def test_a_server_learns_nothing_by_showing_one_client_something_else(keys, tmp_path, change, said) -> None:
    """The others' numbers would be known to it, and the sum the first one's weights, if clients helped to unmask it."""
    lying = type("Lying", (Lying,), {"change": staticmethod(lambda config: config.update(change))})
    with pytest.raises(ProtectionError, match=said):
        play(ready(), tmp_path / "run", keys, lying)


def test_a_client_takes_part_in_no_run_with_less_protection_than_its_keys_were_made_for(keys, tmp_path) -> None:
    federation = ready()
    weaker = federation.experiment.override({"privacy.protection.colluders": 0.0})
    with pytest.raises(
        ProtectionError, match=r"privacy.protection.colluders = 0.0, and this client's keys were made for 0.2"
    ):
        play(prepare(weaker), tmp_path / "colluders", keys)
    plain = prepare(federation.experiment.override({"privacy.protection": "none"}))
    with pytest.raises(
        TrainingError, match=r"privacy.protection = 'none', and this client's keys were made for 'secagg'"
    ):
        play(plain, tmp_path / "none", keys)


def test_a_wrong_folder_of_keys_does_not_mean_a_trusted_server(tmp_path) -> None:
    federation = ready()
    federation.protect(None)
    record = Record.create(federation.experiment, tmp_path / "run")
    config = {"experiment": federation.experiment.toml(), "keys": str(tmp_path / "typo")}
    with pytest.raises(ProtectionError, match=r"has no registry.json"):
        federate(federation, InProcessGrid(app, 5, config), record, Hooks(lambda _row, _state: None))


def test_a_server_whose_folder_holds_a_clients_secret_does_not_start(keys) -> None:
    (keys / "server" / "identity.key").write_bytes((keys / "client-1" / "identity.key").read_bytes())
    with pytest.raises(ProtectionError, match=r"identity.key: a client's secret in the server's folder"):
        ready().protect(keys / "server")
