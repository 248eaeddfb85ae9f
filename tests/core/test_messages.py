"""Lazy arrays are Flower arrays to everybody who reads them, and weigh what they would weigh."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedveil.core.messages import LazyArray, from_arrays, to_arrays, wire_bytes

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)
)


@given(arrays)
def test_a_lazy_array_serialises_to_the_bytes_of_flowers_own(value: np.ndarray) -> None:
    lazy, own = LazyArray(value), Array(value)
    assert lazy.data == own.data
    assert (lazy.dtype, lazy.shape, lazy.stype) == (own.dtype, own.shape, own.stype)


@given(st.dictionaries(st.text(min_size=1, max_size=5), arrays, min_size=1, max_size=3))
def test_wire_bytes_are_counted_without_serialising_and_equal_the_serialised_size(values) -> None:
    lazy = to_arrays(values)
    counted = wire_bytes(RecordDict({"arrays": lazy}))
    assert all(array.__dict__["_data"] is None for array in lazy.values())
    assert counted == sum(len(Array(value).data) for value in values.values())
    assert counted == wire_bytes(RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in values.items()})}))


def test_metrics_and_settings_weigh_too() -> None:
    record = RecordDict({"metrics": MetricRecord({"loss": 0.5}), "config": ConfigRecord({"rate": 0.1})})
    assert wire_bytes(record) == len(record["metrics"].deflate()) + len(record["config"].deflate())


def test_arrays_come_back_by_name_in_order_without_a_copy() -> None:
    values = {"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.float32)}
    back = from_arrays(to_arrays(values))
    assert list(back) == ["b", "a"]
    assert all(back[name] is values[name] for name in values)


def test_a_lazy_array_crosses_flowers_wire_format() -> None:
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = recorddict_from_proto(recorddict_to_proto(RecordDict({"arrays": to_arrays({"w": value})})))
    np.testing.assert_array_equal(content["arrays"]["w"].numpy(), value)
    assert content["arrays"]["w"].shape == pytest.approx((2, 3))


def test_lazy_arrays_travel_to_other_machines_as_flowers_own() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    record = to_arrays({"weight": values})
    objects = {found.object_id: found.deflate() for found in get_all_nested_objects(record).values()}
    back = inflate_object_from_contents(record.object_id, objects)
    assert isinstance(back, ArrayRecord)
    np.testing.assert_array_equal(back["weight"].numpy(), values)
