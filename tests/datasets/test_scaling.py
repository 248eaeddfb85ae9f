"""Features of any size are scaled by a stated rule, as scikit-learn scales them, and what is not scaled is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from fedveil import DataError, Experiment, SettingsError, run
from fedveil.core.settings.sections import Data
from fedveil.datasets.federated import load
from fedveil.datasets.own.local import local, parse_source
from fedveil.datasets.scaling import CUT, scaling, unusual
from fedveil.simulations.display import summary_text
from fedveil.simulations.run import resume

TABLES = arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 4)), elements=st.floats(-1e6, 1e6, width=32))


def settings(**more: object) -> Data:
    return Data.model_validate({"dataset": "own", "path": "somewhere", **more})


def scaled(features: np.ndarray, columns: tuple[str, ...] = (), **more: object) -> np.ndarray:
    found, _ = scaling(features, np.arange(len(features)), columns, settings(**more))
    return found(features) if found else features


# --- the rules


@given(TABLES)
def test_standard_is_scikit_learns_but_for_what_lies_ten_deviations_out(features: np.ndarray) -> None:
    deviation = features.astype(np.float64).std(axis=0)
    known = np.clip(StandardScaler().fit_transform(features.astype(np.float64)), -CUT, CUT)
    found = scaled(features, scale="standard")
    sure = deviation > 1e-6 * np.abs(features).max(axis=0, initial=1e-30)  # else both divide rounding by rounding
    np.testing.assert_allclose(found[:, sure], known[:, sure], atol=1e-4)
    assert np.abs(found).max() <= CUT


@given(TABLES)
def test_minmax_is_scikit_learns(features: np.ndarray) -> None:
    known = MinMaxScaler().fit_transform(features.astype(np.float64))
    sure = np.ptp(features, axis=0) > 1e-14  # scikit-learn takes less for one value
    np.testing.assert_allclose(scaled(features, scale="minmax")[:, sure], known[:, sure], atol=1e-5)


@given(TABLES, st.integers(1, 5))
def test_sums_of_each_client_alone_give_the_same_statistics(features: np.ndarray, clients: int) -> None:
    found, _ = scaling(features, np.arange(len(features)), (), settings(scale="standard"))
    assert found is not None
    parts = [part.astype(np.float64) for part in np.array_split(features, clients)]
    n = sum(len(part) for part in parts)
    mean = sum(part.sum(axis=0) for part in parts) / n
    spread = np.sqrt(sum(((part - mean) ** 2).sum(axis=0) for part in parts) / n)
    np.testing.assert_allclose(found.offset, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.size, np.where(found.size == 1, 1, spread), rtol=1e-5, atol=1e-6)


def test_statistics_are_of_the_training_examples_and_the_others_follow() -> None:
    features = np.array([[0.0], [100.0], [50.0]], np.float32)
    found, notes = scaling(features, np.array([0, 1]), ("age",), settings(scale="minmax"))
    assert found is not None
    assert found(features).tolist() == [[0.0], [1.0], [0.5]]
    assert found.rule == "minmax: 0 to 1 over the training examples (data.scale = 'minmax')"
    assert notes == ()


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([0, 1, 0], ""),
        ([-9.5, 3, 10], ""),
        ([0, 12, 1], "column x runs from 0 to 12"),
        ([-1000, 0, 1], "column x runs from -1000 to 1"),
        ([1e-6, 2e-6, 0], "column x runs from 0 to 2e-06"),
        ([5, 5, 5], ""),
        ([0, 0, 0], ""),
        ([80, 80, 80], "column x runs from 80 to 80"),
        ([1.7e9, 1.7e9 + 4096, 1.7e9], "column x runs from 1.7e+09 to 1.7e+09"),
    ],
)
def test_the_column_that_is_furthest_off_is_named_with_its_range(column: list[float], said: str) -> None:
    features = np.array([[0, value] for value in column], np.float32)
    assert unusual(features, ("flag", "x")) == said


def test_auto_scales_all_columns_where_one_is_off_and_none_where_none_is() -> None:
    usual = np.array([[0, 1], [1, -3], [0.5, 2]], np.float32)
    assert scaled(usual) is usual
    off = usual * np.array([1, 1000], np.float32)
    np.testing.assert_allclose(scaled(off), StandardScaler().fit_transform(off), atol=1e-6)


def test_pixels_of_one_byte_are_scaled_as_images_are() -> None:
    pixels = np.array([[0, 255], [51, 102]], np.uint8)
    assert scaled(pixels).tolist() == (pixels / np.float32(255)).tolist()
    assert scaled(np.array([[0, 1], [1, 0]], np.uint8)).tolist() == [[0, 1], [1, 0]]  # flags stay


@pytest.mark.parametrize("start", [0, 1, 500])
def test_a_column_that_numbers_the_examples_is_named(start: int) -> None:
    rng = np.random.default_rng(0)
    features = np.stack([rng.permutation(50) + start, rng.integers(0, 50, 50)], axis=1).astype(np.float32)
    _, notes = scaling(features, np.arange(50), ("id", "age"), settings())
    assert notes[0] == "column id numbers the examples, and is learned from as a feature; leave it out of the file"
    assert not any("column age numbers" in note for note in notes)


def test_times_in_seconds_are_told_apart_though_float32_holds_one_in_128(tmp_path: Path) -> None:
    times = 1.7e9 + np.arange(40) * 7.0
    pd.DataFrame({"label": np.arange(40) % 2, "time": times}).to_csv(tmp_path / "times.csv", index=False)
    np.savez(tmp_path / "times.npz", labels=np.arange(40) % 2, features=times[:, None])
    for name in ("times.csv", "times.npz"):
        dataset = load(settings(path=str(tmp_path / name), clients=2), 0).dataset
        found = np.concatenate([dataset.train.features, dataset.test.features])  # type: ignore[union-attr]
        assert len(np.unique(found)) == 40
        known = StandardScaler().fit(np.sort(times[:, None])[: len(times)]).scale_
        assert np.ptp(found) == pytest.approx(np.ptp(times) / known[0], rel=0.05)  # of the training examples alone


# --- declared ranges


def test_declared_ranges_of_all_columns_or_of_each() -> None:
    features = np.array([[0, 50], [255, 100]], np.float32)
    assert scaled(features, ranges=[[0, 255]])[1].tolist() == [1, np.float32(100 / 255)]
    assert scaled(features, ranges=[[0, 255], [50, 150]]).tolist() == [[0, 0], [1, 0.5]]


def test_a_value_outside_its_declared_range_is_named() -> None:
    with pytest.raises(
        DataError, match=r"column age runs from 30 to 143, outside 0 to 120, which data.ranges declares"
    ):
        scaled(np.array([[30.0], [143.0]], np.float32), ("age",), ranges=[[0, 120]])
    with pytest.raises(SettingsError, match=r"names 2 ranges, and the examples have 1 columns"):
        scaled(np.zeros((2, 1), np.float32), ranges=[[0, 1], [0, 1]])


@pytest.mark.parametrize("wrong", [[[1, 1]], [[2, 1]], [[0, float("nan")]], [[0]], [0, 1], "0-1"])
def test_what_is_no_range_is_refused(wrong: object) -> None:
    with pytest.raises(SettingsError, match=r"data\.ranges"):
        Experiment.preset("digits").override({"data.dataset": "own", "data.path": "x.csv", "data.ranges": wrong})


def test_ranges_need_a_scale_that_uses_them() -> None:
    base = {"data.dataset": "own", "data.path": "x.csv", "data.ranges": [[0, 1]]}
    with pytest.raises(SettingsError, match=r"has no effect with data.scale = 'standard'"):
        Experiment.preset("digits").override({**base, "data.scale": "standard"})


# --- runs, and clients on machines of their own


def pixels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The digits as pixels from 0 to 255, and as three files: CSV, flat and square arrays."""
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    flat = images.reshape(len(images), -1)
    table = pd.DataFrame(flat, columns=[f"pixel{i}" for i in range(64)])
    table.insert(0, "label", digits.target)
    table.to_csv(folder / "digits.csv", index=False)
    for name, features in (("flat", flat), ("square", images)):
        np.savez(folder / f"{name}.npz", features=features, labels=digits.target)
    return flat, digits.target


def experiment(path: Path, **more: object) -> Experiment:
    changes = {"data.dataset": "own", "data.path": str(path), "federation.rounds": 8, "engine": "sequential"}
    return Experiment.preset("digits").override({**changes, **more})


def test_pixels_to_255_are_learned_from_in_a_table_and_in_arrays_of_any_shape(tmp_path: Path) -> None:
    pixels(tmp_path)
    accuracy, models = {}, {}
    for name in ("digits.csv", "flat.npz", "square.npz"):
        result = run(experiment(tmp_path / name), out=tmp_path / f"run-{name}", plots=False)
        accuracy[name], models[name] = result.summary["test_accuracy"], result.summary["model_sha256"]
        assert result.summary["doubt"] is None
    assert min(accuracy.values()) >= 0.93
    assert models["flat.npz"] == models["square.npz"]
    told = json.loads((tmp_path / "run-digits.csv" / "scaling.json").read_text())
    assert told["columns"][:2] == ["pixel0", "pixel1"]
    train = load(experiment(tmp_path / "digits.csv").data, 0).dataset.train
    assert len(train) == 1438
    assert told["cut"] == CUT
    assert not (tmp_path / "run-square.npz" / "scaling.json").exists()


def test_a_run_that_learned_nothing_says_so_with_its_likely_causes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{rng.integers(2)},{rng.normal() * 1000},{rng.normal()}" for _ in range(400)]
    (tmp_path / "noise.csv").write_text("\n".join(["label,size,x", *lines]))
    small = {"data.scale": "none", "training.learning_rate": 1e-9, "federation.rounds": 1}
    result = run(experiment(tmp_path / "noise.csv", **small), out=tmp_path / "run", plots=False)
    doubt = result.summary["doubt"]
    assert "is no better than guessing the most frequent label" in doubt
    assert "column size runs from" in doubt
    assert "learning rate (training.learning_rate = 1e-09)" in doubt
    assert f"doubt    {doubt}" in summary_text(result)


@pytest.mark.parametrize("scale", ["standard", "minmax"])
def test_scaling_of_what_has_no_columns_is_refused(tmp_path: Path, scale: str) -> None:
    pixels(tmp_path)
    with pytest.raises(
        SettingsError, match=rf"data.scale = '{scale}': scales columns of features, and the data are images"
    ):
        load(experiment(tmp_path / "square.npz", **{"data.scale": scale}).data, 0)


def alone(path: Path, **more: object) -> np.ndarray:
    """The features that a client on its own machine trains on."""
    data = settings(clients=2, labels=tuple("0123456789"), path=None, **more)
    train, _ = local(data, 0, parse_source(str(path)), 1).client(1)
    return train.features


def test_a_client_alone_scales_by_declared_ranges_alone(tmp_path: Path) -> None:
    flat, _ = pixels(tmp_path)
    for name in ("digits.csv", "flat.npz"):
        np.testing.assert_allclose(alone(tmp_path / name, ranges=[[0, 255]]), flat / 255, atol=1e-6)
        with pytest.raises(DataError, match=r"a client alone cannot scale features as the others do; .*data\.ranges"):
            alone(tmp_path / name)
        with pytest.raises(SettingsError, match=r"data.scale = 'standard': needs the statistics of all clients' data"):
            alone(tmp_path / name, scale="standard")
        assert alone(tmp_path / name, scale="none").max() == 255


def test_a_server_that_asks_for_one_range_after_another_learns_nothing_of_a_columns_ends(tmp_path: Path) -> None:
    """Were values outside refused, the refusals would tell the largest value in some twenty runs."""
    (tmp_path / "own.csv").write_text("label,income\n0,51342\n1,20000\n")
    for most in (1.0, 51341.0, 51342.0, 1e9):
        data = settings(clients=2, labels=("0", "1"), path=None, ranges=[[0, most]])
        held = local(data, 0, parse_source(str(tmp_path / "own.csv")), 1)
        np.testing.assert_allclose(
            held.client(1)[0].features, [[min(v, most) / most] for v in (51342, 20000)], rtol=1e-6
        )
        outside = sum(v > most for v in (51342, 20000))
        told = f"{outside} value{'s' if outside > 1 else ''} outside data.ranges taken as the nearest end"
        assert held.dataset.files == ((told,) if outside else ())  # for the owner alone


def test_a_run_that_was_killed_before_its_scaling_was_written_writes_it_when_it_goes_on(tmp_path: Path) -> None:
    pixels(tmp_path)
    run(experiment(tmp_path / "digits.csv", **{"federation.rounds": 1}), out=tmp_path / "run", plots=False)
    path = tmp_path / "run" / "scaling.json"
    written = path.read_bytes()
    path.unlink()
    resume(tmp_path / "run")
    assert path.read_bytes() == written
