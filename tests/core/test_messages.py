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

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.flower import LazyArray
from fedveil.core.wire.messages import (
    from_arrays,
    read_update,
    to_arrays,
    wire_bytes,
    write_update,
)

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


RNG = np.random.default_rng(3)
WEIGHTS = {"w": RNG.normal(size=(4, 3)).astype(np.float32), "b": RNG.normal(size=5).astype(np.float32)}
MODEL = {name: np.zeros_like(value) for name, value in WEIGHTS.items()}
ERRORS = {"float32": 0.0, "float16": 2**-10, "int8": 2**-6}  # at most, of weights up to 3.9


def sent(content: RecordDict) -> RecordDict:
    """What arrives of it over a network."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize(
    ("encoding", "size"), [("float32", 2 * 128 + 4 * 17), ("float16", 2 * 17), ("int8", 2 * 4 + 17)]
)
def test_an_update_arrives_in_its_encoding_and_weighs_that(encoding, size) -> None:
    record, residual = write_update(WEIGHTS, MODEL, encoding, None)
    assert wire_bytes(RecordDict({"arrays": record})) == size
    arrived = sent(RecordDict({"arrays": record}))["arrays"]
    assert {array.stype for array in arrived.values()} == {
        "numpy.ndarray" if encoding == "float32" else f"fedveil.{encoding}"
    }
    assert (residual is None) == (encoding != "int8")
    for weights in (read_update(record, MODEL, encoding), read_update(arrived, MODEL, encoding)):
        assert list(weights) == list(WEIGHTS)
        for name, value in WEIGHTS.items():
            np.testing.assert_allclose(weights[name], value, rtol=0, atol=ERRORS[encoding])


def changed(record: ArrayRecord, **fields) -> ArrayRecord:
    """The record with another second tensor."""
    old = record["b"]
    values = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data} | fields
    return ArrayRecord({"w": record["w"], "b": Array(**values)})


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_an_update_of_another_model_or_encoding_is_refused(encoding) -> None:
    record, _ = write_update(WEIGHTS, MODEL, encoding, None)
    kind = record["b"].stype
    others = {"float32", "float16", "int8"} - {encoding}
    bad = {
        "'b' is missing": ArrayRecord({"w": record["w"]}),
        "'c' is none of its tensors": ArrayRecord({**record, "c": record["b"]}),
        "'a' is none of its tensors": ArrayRecord({"a": record["b"], "w": record["w"]}),
        f"its 'b' is '{encoding}' written as 'fedveil.ckks', where .* asks for '{encoding}' written as '{kind}'": changed(
            record, stype="fedveil.ckks"
        ),
        f"its 'b' is 'float64' written as '{kind}'": changed(record, dtype="float64"),
        r"its 'b' has the shape \(5, 1\), and the model's has \(5,\)": changed(record, shape=(5, 1)),
        r"its 'b' (has \d+ bytes|is no float32 array)": changed(record, data=record["b"].data[:-1]),
    } | {f"its 'w' is '{other}' written as": write_update(WEIGHTS, MODEL, other, None)[0] for other in others}
    for said, update in bad.items():
        with pytest.raises(ProtectionError, match=said):
            read_update(update, MODEL, encoding)


def test_what_a_stranger_wrote_is_quoted_on_one_line_and_cut() -> None:
    record, _ = write_update(WEIGHTS, MODEL, "int8", None)
    text = "\n" + "x" * 10**6
    bad = [{"stype": text}, {"dtype": text}, {"shape": (1,) * 10**6}]
    for update in [*(changed(record, **fields) for fields in bad), ArrayRecord({**record, text: record["b"]})]:
        with pytest.raises(ProtectionError) as caught:
            read_update(update, MODEL, "int8")
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)


def test_arrays_of_this_process_are_checked_too() -> None:
    for wrong in (WEIGHTS["b"].astype(np.float64), WEIGHTS["b"][:-1]):
        with pytest.raises(ProtectionError, match="its 'b'"):
            read_update(to_arrays(WEIGHTS | {"b": wrong}), MODEL, "float32")
    assert read_update(to_arrays(WEIGHTS), MODEL, "float32")["w"] is WEIGHTS["w"]  # not copied
