"""The reader of .npz files: arrays `features` and `labels`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from fedveil.core.errors import DataError, nearest
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.table import Table


def read_npz(path: Path, data: Data, testing: bool = False) -> Table:
    """Read an .npz file with arrays `labels` [n] and `features`: [n, d], or images [n, h, w] or [n, c, h, w].

    `data.label_column` names another array of labels. Images are float in [0, 1] or uint8 in 0..255; True is 1.
    Raise DataError as `read_table` does.
    """
    labelled, group = data.label_column or "labels", data.group_column
    names = [labelled, "features", *([group] if group else [])]
    arrays, present = _load(path, names)
    if testing and group not in arrays:
        names = names[:2]
    for name in names:
        if name not in arrays:
            hint = "; name the array of labels with data.label_column" if name == labelled else ""
            raise DataError(
                f"{path}: no array is called '{name}'{nearest(name, present)}; there is: "
                f"{', '.join(present) or 'no arrays'}{hint}"
            )
        if arrays[name].ndim == 0 or len(arrays[name]) != len(arrays[labelled]):
            shapes = ", ".join(f"{key} {value.shape}" for key, value in arrays.items())
            raise DataError(f"{path}: arrays must have one entry an example; their shapes are {shapes}")
    features, labels = _features(path, arrays["features"]), words(f"{path}: {labelled}", arrays[labelled])
    return Table(
        "features" if features.ndim == 2 else "images",
        labels,
        lambda i: f"{path}, example {i} (the first is 0)",
        features=features,
        sources=words(f"{path}: {names[2]}", arrays[names[2]]) if len(names) > 2 else None,
    )


def _load(path: Path, names: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the named arrays that there are, and the names of all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged header, which is read or refused all the same
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files if name in names}
                present = list(archive.files)
    except Exception as error:  # NumPy, zipfile and the header's parser raise whatever damaged bytes lead to
        raise DataError(
            f"{path}: cannot be read: {error or type(error).__name__}; write it with np.savez(path, features=..., labels=...), "
            "no array of objects"
        ) from None
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):  # NumPy gives the bytes of what is no array
            raise DataError(
                f"{path}: '{name}' in it is no NumPy array; write it with np.savez(path, features=..., labels=...)"
            )
    return arrays, present


def _features(path: Path, features: np.ndarray) -> np.ndarray:
    """Return the features, float64 or uint8 [n, d], or images, float32 [n, c, h, w] in [0, 1]; raise DataError where they are neither."""
    if features.dtype.kind not in "fiub" or features.ndim not in (2, 3, 4) or features.size == 0:
        raise DataError(
            f"{path}: features must be numbers [n, d], [n, h, w] or [n, c, h, w]; they are {features.dtype} {features.shape}"
        )
    is_image = features.ndim > 2
    if features.dtype == np.uint8 and not is_image:
        return features  # to be scaled as pixels
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        numbers = features.astype(np.float32)
    if is_image and features.dtype == np.uint8:
        numbers /= 255
    if not np.isfinite(numbers).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        raise DataError(f"{path}: features{list(where)} is {features[where]}; every feature must be a finite float32")
    if is_image and (numbers.min() < 0 or numbers.max() > 1):
        raise DataError(
            f"{path}: images must lie in [0, 1], or be uint8; these are {features.dtype} in [{numbers.min()}, {numbers.max()}]"
        )
    if not is_image:
        return features.astype(np.float64)
    return numbers[:, np.newaxis] if features.ndim == 3 else numbers


def words(what: str, values: np.ndarray) -> list[str]:
    """Return labels or sources as words; whole numbers of any type are written without a point.

    what: the file and array, for the DataError where they are neither words nor whole numbers [n]
    """
    if (
        values.ndim == 1
        and values.dtype.kind == "f"
        and np.isfinite(values).all()
        and (values == np.rint(values)).all()
    ):
        return [str(int(value)) for value in values.tolist()]
    if values.ndim != 1 or values.dtype.kind not in "iubUS":
        raise DataError(f"{what} must be whole numbers or words [n]; it is {values.dtype} {values.shape}")
    try:
        found = [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.tolist()]
        "".join(found).encode()  # refuses halves of characters
    except (UnicodeError, SystemError):  # the second is NumPy's, of a number that is no character
        raise DataError(f"{what} holds bytes that are no text; save it as words, with .astype(str)") from None
    return found
