"""Encodings of updates: what comes out is what the definition says, nothing is lost for good, and bad bytes are refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.encodings import READERS, from_float16, from_int8, from_npy, to_float16, to_int8

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
numbers = st.floats(-(2.0**100), 2.0**100, width=32)  # the smallest that float32 has among them
triples = shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=numbers)] * 3))
GIVEN = np.zeros((2, 3), np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def by_hand(weights, given, residual) -> tuple[float, list[int], list[np.float32], list[np.float32]]:
    """Scale, levels, decoded weights and residual of a tensor, one number at a time."""
    rows = list(zip(*(a.ravel() for a in (weights, given, residual)), strict=True))
    wanted = [(w - g) + r for w, g, r in rows]
    scale = np.float32(max([abs(x) for x in wanted], default=np.float32(0)) / np.float32(127))
    levels = [max(-127, min(127, round(float(x / scale)))) if scale else 0 for x in wanted]
    moved = [np.float32(q) * scale for q in levels]
    return (
        float(scale),
        levels,
        [g + m for (_, g, _), m in zip(rows, moved, strict=True)],
        [x - m for x, m in zip(wanted, moved, strict=True)],
    )


@given(triples)
def test_int8_is_what_its_formula_says_number_by_number(tensors) -> None:
    weights, given_, residual = tensors
    scale, levels, decoded, lost = by_hand(*tensors)
    written, left = to_int8({"w": weights}, {"w": given_}, residual.reshape(-1))
    assert written["w"] == struct.pack(f"<f{len(levels)}b", scale, *levels)
    assert left.tobytes() == np.array(lost, np.float32).tobytes()
    read = from_int8("w", written["w"], given_)
    assert (read.dtype, read.shape) == (np.float32, given_.shape)
    assert read.tobytes() == np.array(decoded, np.float32).tobytes()


@given(st.lists(hnp.arrays(np.float32, (2, 3), elements=st.floats(-100, 100, width=32)), min_size=1, max_size=20))
def test_what_int8_loses_is_sent_later(differences) -> None:
    """The sum of all that the server added is that of all differences, but for what the last turn lost: half a step."""
    added, residual, zero = np.zeros((2, 3)), None, {"w": GIVEN, "b": np.zeros(0, np.float32)}
    for difference in differences:
        written, residual = to_int8({"w": difference, "b": zero["b"]}, zero, residual)
        added += from_int8("w", written["w"], GIVEN)
    total = np.sum(differences, axis=0, dtype=np.float64)
    np.testing.assert_allclose(added + residual.reshape(2, 3), total, rtol=0, atol=1e-2)
    (scale,) = struct.unpack_from("<f", written["w"])
    assert np.abs(residual).max() <= scale / 2 * (1 + 1e-4) + 1e-40  # a scale that small loses digits itself


def test_a_difference_far_below_a_step_arrives_in_time() -> None:
    difference = np.array([1.0, 0.001], np.float32)  # a step is 0.0079
    zero, residual, added = np.zeros(2, np.float32), None, np.zeros(2)
    for _ in range(100):
        written, residual = to_int8({"w": difference}, {"w": zero}, residual)
        added += from_int8("w", written["w"], zero)
    np.testing.assert_allclose(added, [100, 0.1], atol=0.5 / 127)
    alone, _ = to_int8({"w": difference}, {"w": zero}, None)
    assert from_int8("w", alone["w"], zero)[1] == 0


def test_each_tensor_has_a_step_of_its_own_and_the_residual_is_cut_where_they_meet() -> None:
    weights = {"a": np.array([[1.0, 0.3]], np.float32), "b": np.array([1e-3, 4e-4, 1e-4], np.float32)}
    zero = {name: np.zeros_like(value) for name, value in weights.items()}
    residual = np.array([0.01, -0.02, 1e-5, 2e-5, -3e-5], np.float32)
    written, left = to_int8(weights, zero, residual)
    start = 0
    for name, value in weights.items():
        part = residual[start : start + value.size]
        own, lost = to_int8({name: value}, zero, part)
        assert own[name] == written[name]
        np.testing.assert_array_equal(lost, left[start : start + value.size])
        start += value.size


@given(hnp.arrays(np.float32, shapes, elements=st.floats(-65504, 65504, width=32)))
def test_float16_is_the_nearest_number_that_the_standard_library_writes(weights) -> None:
    data = to_float16({"w": weights})["w"]
    assert data == struct.pack(f"<{weights.size}e", *weights.ravel().tolist())
    read = from_float16("w", data, weights)
    assert (read.dtype, read.shape) == (np.float32, weights.shape)
    assert read.ravel().tolist() == list(struct.unpack(f"<{weights.size}e", data))


@given(hnp.arrays(np.float32, shapes, elements=numbers), st.sampled_from("CF"))
@settings(max_examples=50)
def test_float32_is_read_as_numpy_reads_it(weights, order) -> None:
    data = npy(np.asarray(weights, order=order))
    np.testing.assert_array_equal(from_npy("w", data, weights), np.load(io.BytesIO(data)))


@pytest.mark.parametrize("largest", [65520.0, -7e4, 3e38])
def test_a_weight_beyond_float16_is_refused_and_named(largest) -> None:
    weights = {"a": GIVEN, "dense.weight": np.array([[1.0, largest]], np.float32)}
    with pytest.raises(
        ProtectionError, match=r"'dense.weight' holds .*, and float16 ends at 65504; use .*'float32' or"
    ):
        to_float16(weights)
    assert to_float16({"w": np.array([65519.0], np.float32)})  # rounds to the last one


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf], ids=str)
def test_weights_that_are_not_finite_are_refused_as_divergence(wrong) -> None:
    weights, zero = {"w": np.array([1, wrong], np.float32)}, {"w": np.zeros(2, np.float32)}
    for write in (lambda: to_float16(weights), lambda: to_int8(weights, zero, None)):
        with pytest.raises(ProtectionError, match="training diverged: the new 'w' holds a number that is not finite"):
            write()


def test_a_difference_that_overflows_is_refused() -> None:
    weights, given_ = {"w": np.array([3e38], np.float32)}, {"w": np.array([-3e38], np.float32)}
    with pytest.raises(ProtectionError, match="not finite"):
        to_int8(weights, given_, None)


GOOD = {"float32": npy(GIVEN), "float16": bytes(12), "int8": bytes(10)}


@pytest.mark.parametrize("encoding", READERS)
@given(data=st.binary(max_size=200))
@settings(max_examples=200)
def test_random_bytes_are_refused_or_are_weights_of_the_models_shape(encoding, data) -> None:
    try:
        found = READERS[encoding]("w", data, GIVEN)
    except ProtectionError:
        return
    assert (found.dtype, found.shape) == (np.float32, GIVEN.shape)


@pytest.mark.parametrize("encoding", READERS)
def test_bytes_that_are_too_few_or_too_many_are_refused(encoding) -> None:
    good = GOOD[encoding]
    assert READERS[encoding]("w", good, GIVEN).shape == GIVEN.shape
    for bad in (good[:-1], good[:4], b"", good + b"\0", good * 2):
        with pytest.raises(ProtectionError, match=r"its 'w' (has [\d,]+ bytes, and|is no float32 array)"):
            READERS[encoding]("w", bad, GIVEN)


@pytest.mark.parametrize("scale", [-1e-9, float("nan"), float("inf"), float("-inf"), 3e38], ids=str)
def test_a_scale_that_is_none_is_refused(scale) -> None:
    with pytest.raises(ProtectionError, match=r"the scale of its 'w'(,| is) (-1e-09|nan|inf|-inf|3e\+38)"):
        from_int8("w", struct.pack("<f6b", scale, *[127] * 6), GIVEN)


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_float16_numbers_that_are_not_finite_are_refused(number) -> None:
    with pytest.raises(ProtectionError, match="its 'w' holds a number that is not finite"):
        from_float16("w", struct.pack("<6e", 1, 2, 3, 4, 5, number), GIVEN)


HEADERS = {
    "float64": GIVEN.astype(np.float64),
    "another byte order": GIVEN.astype(">f4"),
    "another shape": GIVEN.T,
    "no dimensions": np.float32(1),
}


@pytest.mark.parametrize("array", HEADERS.values(), ids=HEADERS)
def test_a_numpy_file_of_another_array_is_refused(array) -> None:
    with pytest.raises(ProtectionError, match=r"its 'w' is no float32 array of shape \(2, 3\)"):
        from_npy("w", npy(np.asarray(array)), GIVEN)


def test_a_numpy_file_that_asks_for_more_memory_than_there_is_takes_none() -> None:
    huge = GOOD["float32"].replace(b"(2, 3), }        ", b"(%d, 3), }" % 10**8)
    assert len(huge) == len(GOOD["float32"])
    with pytest.raises(ProtectionError, match="is no float32 array"):
        from_npy("w", huge, GIVEN)
