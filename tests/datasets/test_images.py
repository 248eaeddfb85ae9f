"""Images are read as published: against another reader, another library, and files damaged in every way."""

from __future__ import annotations

import array
import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedveil.core.errors import DataError
from fedveil.core.settings.sections import Data
from fedveil.datasets.published import images


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def plain_reader(content: bytes):
    """An independent reader: shape and flat values, with struct and array only."""
    zero, kind, dimensions = struct.unpack_from(">HBB", content)
    assert (zero, kind) == (0, 8)
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return shape, array.array("B", content[4 + 4 * dimensions :])


@given(npst.arrays(np.uint8, npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6)), st.booleans())
def test_any_array_of_bytes_survives_an_idx_file(tmp_path_factory, values, packed):
    path = tmp_path_factory.mktemp("idx") / "values"
    path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    read = images.read_idx(path)
    assert read.dtype == np.uint8
    assert read.shape == values.shape
    assert np.array_equal(read, values)


@pytest.mark.parametrize("name", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_the_real_files_read_as_another_reader_reads_them(real_data, name):
    path = real_data / "mnist" / f"{name}-ubyte.gz"
    shape, values = plain_reader(gzip.decompress(path.read_bytes()))
    read = images.read_idx(path)
    assert read.shape == shape
    assert read.tobytes() == values.tobytes()


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "nothing"),
        (b"\x89PNG....", "89 50 4e 47"),
        (b"\0\0\x0d" + GOOD[3:], "00 00 0d"),
        (b"\0\0\x08\0", "00 00 08 00"),
        (GOOD[:9], "9 bytes, where 3 dimensions need 16"),
        (GOOD[:-1], "cut off: 39 bytes, where 2 x 3 x 4 values need 40"),
        (GOOD + b"!", "other bytes: 41 bytes"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "4,294,967,295 x 4,294,967,295"),
        (bytes([0, 0, 8, 100]) + struct.pack(">100I", *[1] * 100) + b"1", "100 dimensions"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(GOOD, mtime=0) + b"trailing", "damaged gzip"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff\xff\xff" + gzip.compress(GOOD, mtime=0)[15:], "damaged gzip"),
    ],
)
def test_a_file_that_is_not_idx_is_refused_and_what_was_found_is_said(tmp_path, content, found):
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        images.read_idx(path)
    assert found in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        images.read_idx(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("shape", "labels", "found"),
    [
        ((3, 28, 28), [1, 2], "2 labels for the 3 images"),
        ((2, 28, 27), [1, 2], "2 x 28 x 27"),
        ((2, 28), [1, 2], "2 x 28,"),
        ((3, 28, 28), [1, 10, 11], "label 10 at position 1"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path, shape, labels, found):
    (tmp_path / "images").write_bytes(idx(np.zeros(shape, np.uint8)))
    (tmp_path / "labels").write_bytes(idx(np.array(labels, np.uint8)))
    with pytest.raises(DataError, match=found):
        images.mnist_examples(tmp_path / "images", tmp_path / "labels")


def test_mnist_is_the_published_one(real_data):
    mnist = images.mnist(Data(dataset="mnist"))
    assert np.bincount(mnist.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.train.features.shape == (60000, 1, 28, 28)
    assert mnist.train.features.dtype == np.float32
    assert (mnist.train.features.min(), mnist.train.features.max()) == (0, 1)
    # Mean and deviation as published in PyTorch's MNIST example.
    assert mnist.train.features.mean(dtype=np.float64) == pytest.approx(0.1307, abs=1e-4)
    assert mnist.train.features.std(dtype=np.float64) == pytest.approx(0.3081, abs=1e-4)


def test_digits_are_scikit_learns_each_once_and_the_test_part_is_stratified():
    from sklearn.datasets import load_digits

    digits = images.digits(Data())
    assert digits.task.shape == (1, 8, 8)
    assert digits.train.features.dtype == np.float32
    pixels = np.concatenate([digits.train.features, digits.test.features]).reshape(-1, 64) * 16
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    bunch = load_digits()
    assert sorted(map(tuple, np.c_[labels, pixels])) == sorted(map(tuple, np.c_[bunch.target, bunch.data]))
    shares = np.bincount(digits.test.labels) / np.bincount(labels)
    assert abs(shares - 0.2).max() < 0.005


def test_the_test_part_of_digits_depends_on_nothing_but_its_fraction():
    first, second = images.digits(Data()), images.digits(Data(clients=3, partition="shards"))
    assert np.array_equal(first.test.features, second.test.features)
    assert len(images.digits(Data(test_fraction=0.5)).test) == pytest.approx(1797 / 2, abs=5)
