"""The mean of a cohort against Flower's own, to the byte."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import TrainingError
from fedveil.core.messages import from_arrays, to_arrays
from fedveil.server.aggregate import weighted_mean

SHAPES = {"weight": (3, 4), "bias": (3,), "scale": ()}


def contents(seed: int, counts: list[int], *, lazy: bool) -> list[RecordDict]:
    rng = np.random.default_rng(seed)
    found = []
    for client, count in enumerate(counts):
        arrays = {name: (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4)) for name, shape in SHAPES.items()}
        arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        record = to_arrays(arrays) if lazy else ArrayRecord({name: Array(array) for name, array in arrays.items()})
        metrics = MetricRecord({"client": client, "num-examples": count})
        found.append(RecordDict({"arrays": record, "metrics": metrics}))
    return found


@given(st.integers(0, 999), st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_the_mean_is_flowers_to_the_byte(seed, counts):
    ours = from_arrays(weighted_mean(contents(seed, counts, lazy=True), "num-examples"))
    flowers = aggregate_arrayrecords(contents(seed, counts, lazy=False), "num-examples")
    assert list(ours) == list(flowers)
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, flowers[name].numpy())


def test_the_clients_weights_are_not_changed():
    given_contents = contents(0, [1, 2], lazy=True)
    before = [{k: v.copy() for k, v in from_arrays(c["arrays"]).items()} for c in given_contents]
    mean = from_arrays(weighted_mean(given_contents, "num-examples"))
    for content, arrays in zip(given_contents, before, strict=True):
        for name, array in from_arrays(content["arrays"]).items():
            np.testing.assert_array_equal(array, arrays[name])
            assert not np.shares_memory(array, mean[name])


@pytest.mark.parametrize(
    "shapes", [{"weight": (3, 4)}, SHAPES | {"scale": (2,)}], ids=["a weight is missing", "a weight has another shape"]
)
def test_weights_of_another_network_are_refused_with_the_clients_name(shapes):
    arrays = to_arrays({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    odd = RecordDict({"arrays": arrays, "metrics": MetricRecord({"client": 7, "num-examples": 1})})
    with pytest.raises(TrainingError, match="client 7 sent weights of another network"):
        weighted_mean([*contents(0, [1, 2], lazy=True), odd], "num-examples")
