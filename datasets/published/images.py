"""Images of digits: those of scikit-learn, and MNIST from its published IDX files."""

from __future__ import annotations

import gzip
import math
from importlib import metadata
from pathlib import Path

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import DataError
from fedveil.core.examples import Examples, Task
from fedveil.core.foreign import reading
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.published import sources

CLASSES = tuple("0123456789")


@part(tasks=("classification of images",), uses=("test_fraction",))
def digits(data: Data) -> DataSet:
    """Load 1,797 handwritten digits, float32 [n, 1, 8, 8] in [0, 1], that ship inside scikit-learn.

    The test part (`data.test_fraction`) is stratified and the same for every seed.
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    # the file that sklearn.datasets.load_digits reads; importing scikit-learn would take seconds
    home = Path(str(metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    rows = np.loadtxt(home, delimiter=",", dtype=np.float32)  # 64 pixels from 0 to 16, and the digit
    examples = Examples(rows[:, :-1].reshape(-1, 1, 8, 8) / 16, rows[:, -1].astype(np.int64))
    train, test = splits.stratified(examples.labels, data.test_fraction)
    return DataSet("digits", Task("images", (1, 8, 8), CLASSES), examples.take(train), examples.take(test))


@part(tasks=("classification of images",))
def mnist(data: Data) -> DataSet:
    """Load MNIST: 60,000 digits to train on and 10,000 to test on, float32 [n, 1, 28, 28] in [0, 1].

    LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998. Raise DataError
    where the files are missing or damaged.
    """
    files = sources.find("mnist")
    train = mnist_examples(files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"])
    test = mnist_examples(files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"])
    return DataSet("mnist", Task("images", (1, 28, 28), CLASSES), train, test)


def mnist_examples(images_path: Path, labels_path: Path) -> Examples:
    """Read images and labels of one part of MNIST; raise DataError where they do not fit each other."""
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: an array of {_times(images.shape)}, where images of 28 x 28 are expected")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_path}: {_times(labels.shape)} labels for the {len(images):,} images of {images_path}")
    if labels.max(initial=0) > 9:
        first = int(np.argmax(labels > 9))
        raise DataError(f"{labels_path}: label {labels[first]} at position {first}; labels are 0 to 9")
    features = images.astype(np.float32)[:, np.newaxis]  # [n, 1, 28, 28]
    features /= 255
    return Examples(features, labels.astype(np.int64))


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, gzip-compressed or not: uint8, in the shape its header gives.

    Header, big-endian: 0, 0, 8 (unsigned byte), the number of dimensions; then each dimension as a uint32.
    Raise DataError, with what was found, where the file is anything else, or shorter or longer than its header says.
    """
    content = _content(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise DataError(
            f"{path}: not an IDX file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}, not 00 00 08"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(
            f"{path}: cut off in its header: {len(content)} bytes, where {content[3]} dimensions need {start}"
        )
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape)
    if len(content) != expected:
        wrong = "cut off" if len(content) < expected else "followed by other bytes"
        raise DataError(f"{path}: {wrong}: {len(content):,} bytes, where {_times(shape)} values need {expected:,}")
    with reading(lambda why: DataError(f"{path}: {content[3]} dimensions: {why}")):  # NumPy has fewer
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    with reading(lambda why: DataError(f"{path}: cannot be read: {why}")):
        content = path.read_bytes()
    with reading(lambda why: DataError(f"{path}: damaged gzip file: {why}")):
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
