"""Readers of a user's files: a CSV file, an .npz file, or a folder of images, checked as they are read."""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedveil.core.errors import DataError, SettingsError, nearest

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Table:
    """Labelled examples as a file has them.

    labels: [n], as words
    place: the function from example i to where it is, for errors: "reviews.csv, line 3"
    texts: [n]; None for other kinds
    features: float32 or uint8 [n, d], or images, float32 [n, c, h, w] in [0, 1]; None for text
    columns: names of the features of a CSV file
    sources: [n], as words; None where no column names them
    """

    kind: Literal["text", "features", "images"]
    labels: list[str]
    place: Callable[[int], str]
    texts: list[str] | None = None
    features: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    sources: list[str] | None = None


def read_table(path: Path, group_column: str | None, *, testing: bool = False) -> Table:
    """Read a folder of images, an .npz file, or else a CSV file.

    group_column: the column (in .npz the array) that names each example's source
    testing: whether this is test data, which may lack that column
    Raise DataError that names the file, the line, column or array, and what to do; SettingsError where a folder of
    images should have a group column.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: there is no such file or folder; paths are relative to {Path.cwd()}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.is_dir():
        if group_column is not None and not testing:
            raise SettingsError(f"data.group_column = '{group_column}': {path} is a folder of images, without columns")
        return read_images(path)
    return (read_npz if path.suffix == ".npz" else read_csv)(path, group_column, testing)


def read_csv(path: Path, group_column: str | None, testing: bool = False) -> Table:
    """Read a UTF-8 CSV file with a header: columns `label` and `text`, or `label` and numbers, each a feature.

    Beside `text`, other columns are ignored. Raise DataError as `read_table` does.
    """
    rows = _csv_rows(path)
    _, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if not header:
        raise DataError(f"{path}: the file is empty; it needs a first line that names its columns: label,text")
    separator = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if separator:
        raise DataError(
            f"{path}, line 1: the columns seem to be separated by {separator!r}; write the file with commas"
        )
    if "" in header:
        raise DataError(
            f"{path}, line 1: column {header.index('') + 1} has no name (an index that pandas wrote?); leave it out, in "
            "pandas with to_csv(..., index=False), or name it"
        )
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DataError(f"{path}, line 1: more than one column is called '{min(repeated)}'")
    source = None if testing and group_column not in header else group_column
    for needed in ("label", *([source] if source else [])):
        if needed not in header:
            raise DataError(
                f"{path}, line 1: no column is called '{needed}'{nearest(needed, header)} ({', '.join(header)})"
            )
    is_text = "text" in header
    columns = tuple(name for name in header if name not in ("label", group_column))
    if not columns:
        raise DataError(f"{path}, line 1: beside its label an example needs a column 'text', or columns of numbers")
    take = [header.index(name) for name in columns]
    label_at = header.index("label")
    labels, texts, features, sources, lines = [], [], [], [], []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} value(s), where the header names {len(header)} columns")
        if not row[label_at].strip():
            raise DataError(f"{path}, line {line}, column label: empty; give each example a label or remove the line")
        labels.append(row[label_at].strip())
        lines.append(line)
        if is_text:
            texts.append(row[header.index("text")])
        else:
            features.append(_numbers([row[i] for i in take], columns, f"{path}, line {line}"))
        if source:
            sources.append(row[header.index(source)].strip())
            if not sources[-1]:
                raise DataError(f"{path}, line {line}, column {source}: empty; name each example's source")
    if not labels:
        raise DataError(f"{path}: the file has a header and no examples")
    return Table(
        "text" if is_text else "features",
        labels,
        lambda i: f"{path}, line {lines[i]}",
        texts if is_text else None,
        None if is_text else np.stack(features),
        () if is_text else columns,
        sources if source else None,
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file that are not blank, each with the number of its last line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _numbers(row: list[str], columns: tuple[str, ...], place: str) -> np.ndarray:
    """Return a line's features, float32 [d]; raise DataError, with `place`, where one is not a finite number."""
    try:
        numbers = np.array([float(value) for value in row], np.float64)
    except ValueError:
        numbers = np.array([_number_or_nan(value) for value in row])
    fits = np.abs(numbers) <= np.finfo(np.float32).max  # false for NaN
    if not fits.all():
        wrong = int(np.argmin(fits))
        given = f"'{row[wrong]}'" if row[wrong].strip() else "missing"
        raise DataError(
            f"{place}, column {columns[wrong]}: must be a finite number, it is {given}; correct it, leave the column out, or "
            "name the column of text 'text'"
        )
    return numbers.astype(np.float32)


def _number_or_nan(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def read_npz(path: Path, group_column: str | None, testing: bool = False) -> Table:
    """Read an .npz file with arrays `labels` [n] and `features`: [n, d], or images [n, h, w] or [n, c, h, w].

    Images are float in [0, 1] or uint8 in 0..255. Raise DataError as `read_table` does.
    """
    names = ["labels", "features", *([group_column] if group_column else [])]
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in names}
            present = ", ".join(archive.files) or "no arrays"
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; write it with np.savez(path, features=..., labels=...), no array of objects"
        ) from None
    if testing and group_column not in arrays:
        names = names[:2]
    for name in names:
        if name not in arrays:
            raise DataError(f"{path}: no array is called '{name}'; there is: {present}")
        if arrays[name].ndim == 0 or len(arrays[name]) != len(arrays["labels"]):
            shapes = ", ".join(f"{key} {value.shape}" for key, value in arrays.items())
            raise DataError(f"{path}: arrays must have one entry an example; their shapes are {shapes}")
    features, labels = _npz_features(path, arrays["features"]), _words(path, "labels", arrays["labels"])
    return Table(
        "features" if features.ndim == 2 else "images",
        labels,
        lambda i: f"{path}, example {i} (the first is 0)",
        features=features,
        sources=_words(path, names[2], arrays[names[2]]) if len(names) > 2 else None,
    )


def _npz_features(path: Path, features: np.ndarray) -> np.ndarray:
    """Return the features, float32 or uint8 [n, d], or images [n, c, h, w] in [0, 1]; raise DataError where they are neither."""
    if features.dtype.kind not in "fiub" or features.ndim not in (2, 3, 4) or features.size == 0:
        raise DataError(
            f"{path}: features must be numbers [n, d], [n, h, w] or [n, c, h, w]; they are {features.dtype} {features.shape}"
        )
    is_image = features.ndim > 2
    if features.dtype == np.uint8 and not is_image:
        return features  # to be scaled as pixels
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
    return numbers[:, np.newaxis] if features.ndim == 3 else numbers


def _words(path: Path, name: str, values: np.ndarray) -> list[str]:
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise DataError(f"{path}: {name} must be whole numbers or words [n]; it is {values.dtype} {values.shape}")
    return [str(value) for value in values.tolist()]


def read_images(folder: Path) -> Table:
    """Read images `folder/CLASS/*.png` (or another common ending), grey or RGB, of one size: float32 [n, c, h, w].

    Other files and hidden ones are ignored. Raise DataError as `read_table` does.
    """
    from PIL import Image, UnidentifiedImageError

    classes = _entries(folder, Path.is_dir)
    paths: list[Path] = []
    labels: list[str] = []
    images: list[np.ndarray] = []
    for class_folder in classes:
        files = _entries(class_folder, lambda file: file.suffix.lower() in IMAGE_ENDINGS)
        if not files:
            raise DataError(
                f"{class_folder}: no images ({', '.join(IMAGE_ENDINGS)}); each folder in {folder} is a class"
            )
        for file in files:
            try:
                with Image.open(file) as image:
                    if image.mode not in ("L", "RGB"):
                        raise DataError(f"{file}: its mode is {image.mode}; save it as grey (L) or RGB")
                    pixels = np.asarray(image)
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(f"{file}: not a readable image: {error}") from None
            if images and pixels.shape != images[0].shape:
                raise DataError(
                    f"{file}: {_size(pixels)}, where {paths[0]} is {_size(images[0])}; all images must have one size and mode"
                )
            paths.append(file)
            labels.append(class_folder.name)
            images.append(pixels)
    if not images:
        raise DataError(
            f"{folder}: no folders of images; it must hold one folder a class: {folder / 'CLASS' / 'IMAGE.png'}"
        )
    stacked = np.stack(images).astype(np.float32) / 255  # [n, h, w] or [n, h, w, c]
    features = stacked[:, np.newaxis] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    return Table("images", labels, lambda i: str(paths[i]), features=np.ascontiguousarray(features))


def _entries(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Return the entries of a folder that are wanted and not hidden, sorted."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and wanted(entry))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels, {'grey' if pixels.ndim == 2 else 'RGB'}"
