"""The mean of a cohort against Flower's own, to the byte."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.algorithms.fedavg import weighted_mean

SHAPES = {"weight": (3, 4), "bias": (3,), "scale": ()}


def updates(seed: int, clients: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(clients):
        arrays = {name: (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4)) for name, shape in SHAPES.items()}
        found.append({name: np.asarray(array, np.float32) for name, array in arrays.items()})
    return found


@settings(deadline=None)
@given(st.integers(0, 999), st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_the_mean_is_flowers_to_the_byte(seed, counts) -> None:
    weights = updates(seed, len(counts))
    contents = [
        RecordDict({
            "arrays": ArrayRecord({name: Array(array) for name, array in own.items()}),
            "metrics": MetricRecord({"num-examples": count}),
        })
        for own, count in zip(weights, counts, strict=True)
    ]  # fmt: skip
    ours, flowers = weighted_mean(weights, counts), aggregate_arrayrecords(contents, "num-examples")
    assert list(ours) == list(flowers)
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, flowers[name].numpy())


def test_the_clients_weights_are_not_changed() -> None:
    given_weights = updates(0, 2)
    before = [{name: array.copy() for name, array in own.items()} for own in given_weights]
    mean = weighted_mean(given_weights, [1, 2])
    for own, arrays in zip(given_weights, before, strict=True):
        for name, array in own.items():
            np.testing.assert_array_equal(array, arrays[name])
            assert not np.shares_memory(array, mean[name])
