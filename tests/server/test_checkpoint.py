"""A checkpoint gives back the state and what every strategy keeps, to the bit, and refuses what does not fit."""

from __future__ import annotations

import shutil

import hypothesis
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from helpers.support import GLOBAL, SHAPES, experiment, make, play_round
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from fedveil import SettingsError
from fedveil.algorithms.algorithm import Cohort, Contribution
from fedveil.core.record.record import Record
from fedveil.core.wire.messages import from_arrays, to_arrays
from fedveil.server.checkpoint import FILE, State, begun, load_state, put_back, save_state
from fedveil.server.flower_strategies import FlowerStrategy


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
    model = GLOBAL
    for number in (1, 2):
        model, _ = play_round(strategy, number, model)
    save_state(record, settings, state(), strategy)
    other = make(settings)
    _, kept = load_state(record)
    other.restore(kept)
    models = [play_round(s, 3, model)[0] for s in (strategy, other)]
    for key in SHAPES:
        np.testing.assert_array_equal(models[0][key], models[1][key])


def test_the_state_comes_back_whole(record) -> None:
    settings = experiment("fedavg")
    save_state(record, settings, state(), make(settings))
    back, kept = load_state(record)
    assert kept == {}
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
        "best_loss",
        "stale",
        "stopped",
        "bytes_up",
        "bytes_down",
        "seconds",
    ):
        assert getattr(back, field) == getattr(wanted, field)


def test_where_clients_states_are_comes_back_and_takes_no_room_where_there_are_none(record) -> None:
    class Store:
        def commit(self) -> dict[str, np.ndarray]:
            return {"residuals/slots": np.array([[7, 0], [12, 2]])}

    settings, now = experiment("fedavg"), state()
    save_state(record, settings, now, make(settings))
    assert not [key for key in load_file(record.path(FILE)) if key.startswith("clients/")]
    assert load_state(record)[0].client_index == {}
    now.clients = Store()
    save_state(record, settings, now, make(settings))
    back = load_state(record)[0].client_index
    assert back["residuals/slots"].tolist() == [[7, 0], [12, 2]]


@pytest.fixture
def saved(record) -> Record:
    """A record with a checkpoint."""
    settings = experiment("fedavg")
    record.append("metrics.csv", [{"round": 3, "loss": 0.5}])
    save_state(record, settings, state(), make(settings))
    return record


def test_an_experiment_that_was_edited_or_is_another_runs_is_refused(saved, tmp_path) -> None:
    settings = experiment("fedavg").override({"training.learning_rate": 0.2})
    other = Record.create(settings, tmp_path / "other")
    shutil.copy(saved.path(FILE), other.path(FILE))
    for edited in (saved, other):
        edited.write("experiment.toml", settings.toml().encode())
        with pytest.raises(SettingsError, match=r"experiment.toml is not the one that the checkpoint was made with"):
            load_state(Record(edited.folder))


def test_an_edit_while_the_run_goes_on_is_seen_when_it_is_resumed(saved) -> None:
    settings = experiment("fedavg")
    saved.write("experiment.toml", settings.override({"training.learning_rate": 0.2}).toml().encode())
    save_state(saved, settings, state(), make(settings))
    with pytest.raises(SettingsError, match=r"experiment.toml is not the one"):
        load_state(Record(saved.folder))


def test_a_checkpoint_that_was_cut_is_refused(saved) -> None:
    content = saved.path(FILE).read_bytes()
    for damaged in (b"", content[:20], content[:-5], content + b"more", b"\xff" * 100, b"\0" * len(content)):
        saved.path(FILE).write_bytes(damaged)
        with pytest.raises(SettingsError, match="is damaged"):
            load_state(saved)


@hypothesis.given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
def test_a_checkpoint_with_one_changed_byte_is_refused(saved, where, flip) -> None:
    content = saved.path(FILE).read_bytes()
    damaged = bytearray(content)
    damaged[int(where * len(content))] ^= flip
    saved.path(FILE).write_bytes(damaged)
    try:
        if bytes(damaged).split() != content.split():  # white space after the header means nothing
            with pytest.raises(SettingsError, match=r"is damaged|was written by another version of FedVeil"):
                load_state(saved)
    finally:
        saved.path(FILE).write_bytes(content)
    load_state(saved)


def test_a_checkpoint_of_another_format_is_refused(saved, monkeypatch) -> None:
    settings = experiment("fedavg")
    with monkeypatch.context() as patch:
        patch.setattr("fedveil.server.checkpoint.FORMAT", 99)
        save_state(saved, settings, state(), make(settings))
    with pytest.raises(SettingsError, match=r"another version of FedVeil \(format 99; this version reads 5\)"):
        load_state(saved)


def test_the_checkpoint_is_what_safetensors_writes(saved) -> None:
    arrays = load_file(saved.path(FILE))
    with safe_open(saved.path(FILE), framework="numpy") as file:
        assert set(file.metadata()) == {"format", "fedveil", "crc32"}
    for name, value in state().parameters.items():
        np.testing.assert_array_equal(arrays[f"model/{name}"], value)
    assert arrays["rows/metrics.csv"].tobytes() == saved.path("metrics.csv").read_bytes()
    assert arrays["train_losses"].tolist() == state().train_losses


def test_a_lost_checkpoint_is_told_from_one_that_was_never_made(saved) -> None:
    assert begun(saved)
    saved.path(FILE).unlink()
    with pytest.raises(SettingsError, match=r"state.safetensors is missing, and rounds were done"):
        begun(saved)
    saved.path("metrics.csv").unlink()
    assert not begun(saved)


def test_a_killed_run_gets_back_tables_and_models_of_its_last_whole_round(saved) -> None:
    names = ("metrics.csv", "model.safetensors")
    whole = {name: saved.path(name).read_bytes() for name in names}
    for name in names:
        saved.path(name).write_bytes(whole[name] + b"4,0.2")
    for lost in (False, True):
        if lost:
            for name in names:
                saved.path(name).unlink()
        record = Record(saved.folder)
        put_back(record, load_state(record)[0])
        assert {name: saved.path(name).read_bytes() for name in names} == whole
        best = load_file(saved.path("best.safetensors"))
        assert all((best[name] == value).all() for name, value in state().best_parameters.items())


def flowers_own() -> tuple[FedAvg, FlowerStrategy]:
    """A Flower strategy of a user's own, and how a round sees it."""
    strategy = FedAvg(weighted_by_key="num-examples")
    return strategy, FlowerStrategy("fedavg", strategy)


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_a_strategys_arrays_of_every_kind_and_shape_come_back(kind, record) -> None:
    (strategy, step), (other, other_step) = flowers_own(), flowers_own()
    strategy.mine = {
        "none": np.zeros((0, 3), kind), "one": np.array(1, kind), "many": np.arange(24).astype(kind).reshape(2, 3, 4).T
    }  # fmt: skip
    save_state(record, experiment("fedavg"), state(), step)
    other_step.restore(load_state(record)[1])
    for name, value in strategy.mine.items():
        back = other.mine[name]
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(back, value)
        back[...] = 0  # a strategy may compute in place


def test_a_users_own_strategy_keeps_what_it_needs_and_is_told_what_cannot_be_kept(record) -> None:
    settings = experiment("fedavg")
    (strategy, step), (other, other_step) = flowers_own(), flowers_own()
    control = {"client-3": np.arange(3.0), "client-1": np.ones((2, 2))}
    strategy.control, strategy.count, strategy.t, strategy.mean = control, 7, [1, 2], np.float32([0.5])
    strategy.arrays = to_arrays(GLOBAL)
    save_state(record, settings, state(), step)
    kept = load_state(record)[1]
    assert kept["weighted_by_key"] == "num-examples"
    other_step.restore(kept)
    assert list(other.control) == list(control)
    assert all((other.control[key] == control[key]).all() for key in control)
    assert all((from_arrays(other.arrays)[key] == value).all() for key, value in GLOBAL.items())
    assert (other.count, other.t, other.mean.tolist()) == (7, [1, 2], [0.5])
    for unfit in ({1, 2}, np.array([1j]), [np.array("text")]):
        strategy.seen = unfit
        with pytest.raises(SettingsError, match=r"fedavg.seen is a (set|ndarray|list), which no checkpoint can hold"):
            save_state(record, settings, state(), step)


def test_an_algorithms_state_of_numbers_without_a_shape_comes_back(record) -> None:
    """NumPy makes a number of an array of no dimension wherever it computes with one."""
    settings, strategy = experiment("fedadam"), make(experiment("fedadam"))
    scale = {"scale": np.array(2, np.float32)}
    strategy.aggregate(1, Cohort(scale, [Contribution(0, {"scale": np.array(3, np.float32)}, 1)], 0.1, 1))
    save_state(record, settings, state(), strategy)
    other, kept = make(settings), load_state(record)[1]
    other.restore(kept)
    assert kept["t"] == 1
    cohort = Cohort(scale, [Contribution(0, {"scale": np.array(5, np.float32)}, 1)], 0.1, 1)
    assert strategy.aggregate(2, cohort) == other.aggregate(2, cohort)


def test_the_models_lie_beside_the_checkpoint_after_every_round(record) -> None:
    settings, best = experiment("fedavg"), state()
    best.best_round = best.round
    save_state(record, settings, best, make(settings))
    for name, parameters in (("model", best.parameters), ("best", best.best_parameters)):
        stored = load_file(record.path(f"{name}.safetensors"))
        assert all((stored[key] == value).all() for key, value in parameters.items())
