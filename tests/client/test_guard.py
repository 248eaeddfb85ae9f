"""The leak guard: a telling update is named or kept back, whatever the engine; a quiet one passes."""

from __future__ import annotations

import logging

import pytest

from fedveil import Experiment, SettingsError, TrainingError, run
from fedveil.client.learning.runtime import client_runtime
from fedveil.client.learning.transforms import guard
from fedveil.core.errors import ProtectionError
from fedveil.models.parameters import get, to_numpy

ONE = {
    "data.client_examples": 1, "training.batch_size": 1, "federation.rounds": 1, "federation.cohort": 3,
    "data.clients": 4, "model.hidden": [16],
}  # fmt: skip


def experiment(**settings) -> Experiment:
    return Experiment.preset("digits").override(ONE | {key.replace("__", "."): v for key, v in settings.items()})


@pytest.mark.parametrize("engine", ["sequential", "processes", "batched"])
def test_what_reveals_an_image_is_named_for_every_client(tmp_path, engine, caplog) -> None:
    with caplog.at_level(logging.WARNING, "fedveil.guard"):
        run(experiment(privacy__leak_guard="warn", engine=engine), out=tmp_path / "run", plots=False)
    said = [record.getMessage() for record in caplog.records if record.name == "fedveil.guard"]
    assert len(said) == 3
    assert all("this update reveals the image exactly (" in text for text in said)


@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_what_reveals_an_image_is_kept_back_and_the_server_is_not_told_what(tmp_path, engine) -> None:
    with pytest.raises(TrainingError, match="made no model of 0 replies") as ended:
        run(experiment(privacy__leak_guard="refuse", engine=engine), out=tmp_path / "run", plots=False)
    assert str(ended.value).count("the client's own guard kept its update back") == 3
    assert "dB" not in str(ended.value)


def test_an_update_covered_by_noise_passes(tmp_path, caplog) -> None:
    covered = experiment(privacy__leak_guard="warn", privacy__clip=0.1, privacy__noise_multiplier=1.0)
    with caplog.at_level(logging.WARNING, "fedveil.guard"):
        run(covered, out=tmp_path / "run", plots=False)
    assert not [record for record in caplog.records if record.name == "fedveil.guard"]


def test_the_stricter_of_settings_and_owner_goes() -> None:
    lax, strict = (client_runtime(experiment().toml(), leak_guard=least) for least in ("off", "refuse"))
    given = to_numpy(get(lax.network))
    weights = {name: value.copy() for name, value in given.items()}
    guard(strict, 0, given, weights)  # nothing moved, nothing is revealed
    examples = lax.federated.client(0)[0]
    weights["dense1.weight"] += examples.features.reshape(1, -1) * 0.5
    weights["dense1.bias"] += 0.5
    guard(lax, 0, given, weights)
    with pytest.raises(ProtectionError, match="leak_guard = 'refuse'"):
        guard(strict, 0, given, weights)


def test_a_guard_over_ciphertexts_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"privacy\.leak_guard = 'warn': looks at updates in the clear"):
        experiment(privacy__leak_guard="warn", privacy__protection="ckks")
