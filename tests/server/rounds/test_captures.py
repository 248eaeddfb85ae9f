"""Captures hold what the server saw, to the bit, and nothing of what it did not."""

from __future__ import annotations

import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedveil import Experiment, SettingsError, run
from fedveil.core.wire.messages import SEALED, WEIGHT
from fedveil.server.rounds.captures import FOLDER, read_captures

SMALL = {
    "data.clients": 5, "model.hidden": [16], "training.epochs": 1, "federation.cohort": 3, "federation.rounds": 2,
    "federation.capture": True,
}  # fmt: skip


def captured(tmp_path, **settings):
    experiment = Experiment.preset("digits").override({**SMALL, **settings})
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    return folder, read_captures(folder)


def test_the_rounds_of_a_plain_run_follow_one_another_and_end_with_its_model(tmp_path) -> None:
    folder, rounds = captured(tmp_path)
    assert [each.round for each in rounds] == [1, 2]
    first, second = rounds
    model = load_file(folder / "model.safetensors")
    assert list(first.before)[:2] == ["dense1.weight", "dense1.bias"]  # in the network's order, not the file's
    for name in model:
        assert np.array_equal(first.after[name], second.before[name])
        assert np.array_equal(second.after[name], model[name])
        total = sum(update.metrics[WEIGHT] for update in second.updates.values())
        mean = sum(update.weights[name] * (update.metrics[WEIGHT] / total) for update in second.updates.values())
        assert np.allclose(mean, second.after[name], atol=1e-6)
    assert all(len(each.updates) == 3 for each in rounds)
    assert stat.S_IMODE((folder / FOLDER).stat().st_mode) == 0o700


@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_every_engine_captures_the_same(tmp_path, engine) -> None:
    _, mine = captured(tmp_path / engine, engine=engine)
    _, other = captured(tmp_path / "other", engine="sequential")
    for a, b in zip(mine, other, strict=True):
        assert a.updates.keys() == b.updates.keys()
        assert all(
            np.array_equal(a.updates[k].weights[name], b.updates[k].weights[name])
            for k in a.updates for name in a.before
        )  # fmt: skip


def test_an_encoded_update_is_captured_as_the_server_reads_it(tmp_path) -> None:
    _, rounds = captured(tmp_path, **{"communication.encoding": "float16"})
    weights = next(iter(rounds[0].updates.values())).weights
    assert all(np.array_equal(value, value.astype(np.float16).astype(np.float32)) for value in weights.values())


@pytest.mark.parametrize("protection", ["ckks", "bfv", "secagg"])
def test_of_a_protected_update_only_its_bytes_are_there(tmp_path, protection) -> None:
    _, rounds = captured(tmp_path, **{"privacy.protection": protection})
    for each in rounds:
        assert all(update.weights is None and update.sealed for update in each.updates.values())
    opened = protection == "secagg"  # its sum is the server's to see
    assert (SEALED not in rounds[1].before) == opened
    assert (SEALED not in rounds[1].after) == opened


def test_a_run_without_captures_or_with_a_damaged_one_says_so(tmp_path) -> None:
    experiment = Experiment.preset("digits").override({**SMALL, "federation.capture": False})
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    with pytest.raises(SettingsError, match=r"no captures.*federation\.capture=true"):
        read_captures(folder)
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "round-1.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(SettingsError, match="is no capture of a round"):
        read_captures(folder)
