"""A checkpoint gives back the state and what every strategy keeps, to the bit, and refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from support import GLOBAL, SHAPES, experiment, play_round

from fedveil import SettingsError
from fedveil.core.messages import from_arrays, to_arrays
from fedveil.core.record import Record
from fedveil.server.checkpoint import FILE, State, load_state, restore, save_state
from fedveil.server.strategies import make


@pytest.fixture
def record(tmp_path) -> Record:
    return Record.create(experiment("fedavg"), tmp_path / "run")


def state() -> State:
    parameters = {name: np.full(shape, np.pi, np.float32) for name, shape in SHAPES.items()}
    return State(
        parameters,
        3,
        [0.1, 1 / 3, 2.5],
        2,
        0.75,
        {k: v * 2 for k, v in parameters.items()},
        1,
        "",
        "digest",
        12,
        34,
        1.5,
    )


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "qfedavg", "fedmedian"])
def test_a_strategy_goes_on_as_if_it_had_never_stopped(name: str, record) -> None:
    settings = experiment(name)
    strategy = make(settings)
    arrays = to_arrays(GLOBAL)
    for number in (1, 2):
        arrays, _ = play_round(strategy, number, arrays)
    save_state(record, settings, state(), strategy)
    other = make(settings)
    _, kept = load_state(record)
    restore(other, kept)
    models = [play_round(s, 3, arrays)[0] for s in (strategy, other)]
    for key in SHAPES:
        np.testing.assert_array_equal(from_arrays(models[0])[key], from_arrays(models[1])[key])


def test_the_state_comes_back_whole(record) -> None:
    settings = experiment("fedavg")
    save_state(record, settings, state(), make(settings))
    back, kept = load_state(record)
    assert kept["weighted_by_key"] == "num-examples"
    wanted = state()
    for field in ("parameters", "best_parameters"):
        assert list(getattr(back, field)) == list(SHAPES)
        for name, value in getattr(wanted, field).items():
            np.testing.assert_array_equal(getattr(back, field)[name], value)
    for field in (
        "round",
        "train_losses",
        "best_round",
        "best_accuracy",
        "stale",
        "stopped",
        "bytes_up",
        "bytes_down",
        "seconds",
    ):
        assert getattr(back, field) == getattr(wanted, field)


def test_an_edited_experiment_or_a_damaged_file_is_refused(record) -> None:
    settings = experiment("fedavg")
    with pytest.raises(SettingsError, match="no round was finished"):
        load_state(record)
    save_state(record, settings, state(), make(settings))
    content = record.path(FILE).read_bytes()
    for damaged in (b"", content[:20], content[:-5], b"\xff" * 100):
        record.path(FILE).write_bytes(damaged)
        with pytest.raises(SettingsError, match="is damaged"):
            load_state(record)
    record.path(FILE).write_bytes(content)
    record.write("experiment.toml", settings.override({"training.learning_rate": 0.2}).toml().encode())
    with pytest.raises(SettingsError, match=r"experiment.toml is not the one that the checkpoint was made with"):
        load_state(record)


def test_a_users_own_strategy_keeps_what_it_needs_and_is_told_what_cannot_be_kept(record) -> None:
    settings = experiment("fedavg")
    strategy, other = make(settings), make(settings)
    control = {"client-3": np.arange(3.0), "client-1": np.ones((2, 2))}
    strategy.control, strategy.count, strategy.t, strategy.mean = control, 7, [1, 2], np.float32([0.5])
    save_state(record, settings, state(), strategy)
    restore(other, load_state(record)[1])
    assert list(other.control) == list(control)
    assert all((other.control[key] == control[key]).all() for key in control)
    assert (other.count, other.t, other.mean.tolist()) == (7, [1, 2], [0.5])
    strategy.seen = {1, 2}
    with pytest.raises(SettingsError, match=r"fedavg.seen is a set, which no checkpoint can hold"):
        save_state(record, settings, state(), strategy)


def test_the_models_lie_beside_the_checkpoint_after_every_round(record) -> None:
    from safetensors.numpy import load_file

    settings, best = experiment("fedavg"), state()
    best.best_round = best.round
    save_state(record, settings, best, make(settings))
    for name, parameters in (("model", best.parameters), ("best", best.best_parameters)):
        stored = load_file(record.path(f"{name}.safetensors"))
        assert all((stored[key] == value).all() for key, value in parameters.items())
