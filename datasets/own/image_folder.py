"""The reader of folders of images: a folder for each class."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedveil.core.errors import DataError
from fedveil.datasets.own.table import Table, count

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def read_images(folder: Path) -> Table:
    """Read images `folder/CLASS/*.png` (or another common ending), grey or RGB, of one size: float32 [n, c, h, w].

    Hidden files are ignored; other files, and images in folders further down, are counted in the table's notes.
    Raise DataError as `read_table` does.
    """
    classes = _entries(folder, Path.is_dir)
    _check_place(folder, classes)
    paths: list[Path] = []
    images: list[np.ndarray] = []
    left: Counter[str] = Counter()
    for class_folder in classes:
        files = _entries(class_folder, lambda file: _is_image(file) and not file.is_dir())
        below = [file for file in _entries(class_folder, Path.is_dir) for file in _below(file)]
        left["image"] += len(below)
        left["file"] += len(_entries(class_folder, lambda file: not file.is_dir() and not _is_image(file)))
        if not files:
            deeper = f"; further down {count(len(below), 'image')}, as {below[0]}" if below else ""
            raise DataError(
                f"{class_folder}: no images ({', '.join(IMAGE_ENDINGS)}){deeper}; each folder in {folder} is a class"
            )
        for file in files:
            pixels, frames = _pixels(file)
            left["frame"] += frames - 1
            if images and pixels.shape != images[0].shape:
                raise DataError(
                    f"{file}: {_size(pixels)}, where {paths[0]} is {_size(images[0])}; all images must have one size and mode"
                )
            paths.append(file)
            images.append(pixels)
    stacked = np.stack(images).astype(np.float32) / 255  # [n, h, w] or [n, h, w, c]
    features = stacked[:, np.newaxis] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    said = {
        "image": "in folders below a class left out",
        "file": "that are no images of a known kind left out",
        "frame": "after an image's first left out",
    }
    return Table(
        "images",
        [path.parent.name for path in paths],
        lambda i: str(paths[i]),
        features=np.ascontiguousarray(features),
        notes=tuple(f"{count(left[what], what)} {words}" for what, words in said.items() if left[what]),
    )


def train_and_test(folder: Path) -> tuple[Path, Path, tuple[str, ...]] | None:
    """Return a folder's `train` and `test`, in any case, and notes of what else is in it; None where it lacks one."""
    if not folder.is_dir():
        return None
    inside = _entries(folder, Path.is_dir)
    named = {entry.name.lower(): entry for entry in inside}
    if "train" not in named or "test" not in named:
        return None
    more = [entry.name for entry in inside if entry not in (named["train"], named["test"])]
    notes = (f"{count(len(more), 'folder')} beside train and test not read: {', '.join(more[:5])}",) if more else ()
    return named["train"], named["test"], notes


def _check_place(folder: Path, classes: list[Path]) -> None:
    """Raise DataError where a folder holds files that should lie elsewhere, or no folders."""
    loose = _entries(folder, lambda file: not file.is_dir() and _is_image(file))
    tables = _entries(folder, lambda file: file.suffix.lower() in (".csv", ".tsv", ".npz", ".parquet"))
    needed = f"it must hold one folder a class: {folder / 'CLASS' / 'IMAGE.png'}"
    if loose:
        raise DataError(f"{folder}: {count(len(loose), 'image')} of no class, as {loose[0].name}; {needed}")
    if not classes:
        instead = f"; to read {tables[0].name}, give its path: {tables[0]}" if tables else ""
        raise DataError(f"{folder}: no folders of images; {needed}{instead}")


def _pixels(file: Path) -> tuple[np.ndarray, int]:
    """Return an image, uint8 [h, w] or [h, w, 3], and its number of frames."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of large images, which are read
            with Image.open(file) as image:
                mode, pixels = image.mode, np.asarray(image)
                frames = getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow raises whatever damaged bytes lead to
        raise DataError(f"{file}: not a readable image: {error or type(error).__name__}") from None
    if mode not in ("L", "RGB"):
        raise DataError(f"{file}: its mode is {mode}; save it as grey (L) or RGB")
    return pixels, frames


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_ENDINGS


def _below(folder: Path) -> list[Path]:
    """Return the images in a folder and all folders in it, sorted; links to folders are not followed."""
    return sorted(file for file in folder.rglob("*") if _is_image(file) and file.name[0] != ".")


def _entries(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Return the entries of a folder that are wanted and not hidden, sorted."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and wanted(entry))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels, {'grey' if pixels.ndim == 2 else 'RGB'}"
