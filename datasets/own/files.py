"""A user's file or folder: what it is, by its content and name, and the reader of that."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path
from typing import Literal

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.csv_file import read_csv
from fedveil.datasets.own.image_folder import IMAGE_ENDINGS, read_images
from fedveil.datasets.own.npz_file import read_npz
from fedveil.datasets.own.parquet_file import read_parquet
from fedveil.datasets.own.table import Table

CONVERT = "write it as CSV, in pandas with {}(path).to_csv('data.csv', index=False)"
UNPACK = "unpack it, and give the path of the file or folder in it"
SAVE = "save it with np.savez(path, features=..., labels=...)"
ONE_IMAGE = "give the folder that holds a folder of images for each class"

# how a file of another kind begins, its endings, what it is, and what to do; by the first of these that fits
OTHERS: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (rb"\x93NUMPY", (".npy",), "a single NumPy array", SAVE),
    (rb"\xd0\xcf\x11\xe0", (".xls", ".xlsx", ".xlsm", ".ods"), "a spreadsheet", CONVERT.format("read_excel")),
    (rb"\s*[\[{]\s*[\"\[{]", (".json", ".jsonl", ".ndjson"), "JSON", CONVERT.format("read_json")),
    (rb"\x80[\x02-\x05]", (".pkl", ".pickle", ".joblib"), "a pickle, which can run code when it is opened", SAVE),
    (rb"ARROW1|FEA1", (".feather", ".arrow", ".ipc"), "an Arrow file", CONVERT.format("read_feather")),
    (rb"\x89HDF\r\n", (".h5", ".hdf5"), "an HDF5 file", SAVE),
    (rb"MATLAB 5", (".mat",), "a MATLAB file", SAVE),
    (rb"SQLite format 3", (".sqlite", ".sqlite3", ".db"), "a database", CONVERT.format("read_sql")),
    (rb"\x28\xb5\x2f\xfd", (".zst",), "packed by Zstandard", UNPACK),
    (rb"7z\xbc\xaf|Rar!", (".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"), "an archive", UNPACK),
    (rb"%PDF", (".pdf",), "a PDF", "give the data itself, as CSV"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", IMAGE_ENDINGS, "one image", ONE_IMAGE),
    (rb"(?!)", (".pt", ".pth", ".safetensors"), "tensors of a model", SAVE),
    (rb"(?!)", (".rds", ".rdata", ".sav", ".dta", ".sas7bdat"), "data of a statistics program", "export it as CSV"),
)


def read_table(path: Path, data: Data, *, testing: bool = False) -> Table:
    """Read a folder of images, an .npz or Parquet file, or else a CSV file, by the settings of `[data]`.

    testing: whether this is test data, which may lack the column of sources
    Raise DataError that names the file, the line, column or array, and what to do; SettingsError where a folder of
    images should have a group column.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: there is no such file or folder; paths are relative to {Path.cwd()}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        if data.group_column is not None and not testing:
            raise SettingsError(
                f"data.group_column = '{data.group_column}': {path} is a folder of images, without columns"
            )
        _check_used(path, "a folder of images", data, ("label_column", "separator", "encoding"), testing)
        return read_images(path)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is a pipe or device; a file is read more than once, so write it to one first")
    kind = _kind(path)
    if kind != "csv":
        _check_used(path, "no CSV file", data, ("separator", "encoding"), testing)
    return {"csv": read_csv, "npz": read_npz, "parquet": read_parquet}[kind](path, data, testing)


def _check_used(path: Path, what: str, data: Data, unused: tuple[str, ...], testing: bool) -> None:
    """Raise SettingsError for a setting that would have no effect; test data and clients' files may be of other kinds."""
    for key in unused:
        value = getattr(data, key)
        if value is not None and not testing:
            raise SettingsError(f"data.{key} = {value!r}: has no effect, as {path} is {what}; leave it out")


def _kind(path: Path) -> Literal["csv", "npz", "parquet"]:
    """Return what a file is, first by its content; raise DataError where it is of a kind that is not read."""
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if start.startswith(b"PK"):
        return _in_zip(path)
    if start.startswith(b"PAR1"):
        return "parquet"
    other = next((row for row in OTHERS if re.match(row[0], start)), None)
    if other is None and name.endswith(".npz"):
        return "npz"
    if other is None and name.endswith((".parquet", ".pq")):
        return "parquet"
    other = other or next((row for row in OTHERS if name.endswith(row[1])), None)
    if other is None and name.endswith(".zip"):
        raise DataError(f"{path}: is not a zip archive, as its name says, nor another file that is read")
    if other is not None:
        raise DataError(f"{path}: is {other[2]}, which is not read; {other[3]}")
    return "csv"


def _in_zip(path: Path) -> Literal["npz"]:
    """Return what a zip archive is, which an .npz file and a workbook are too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # zipfile raises whatever damaged bytes lead to
        if path.name.lower().endswith(".npz"):
            return "npz"  # its reader says what is wrong
        raise DataError(f"{path}: is a zip archive that cannot be read: {error}") from None
    if any(name.endswith(".npy") for name in names) or path.name.lower().endswith(".npz"):
        return "npz"
    if any(name.startswith(("xl/", "content.xml")) for name in names):
        raise DataError(f"{path}: is a spreadsheet, which is not read; {CONVERT.format('read_excel')}")
    inside = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    raise DataError(f"{path}: is a zip archive, which is not read{inside}; {UNPACK}")
