"""The reader of Parquet files, by pandas and pyarrow: the same columns as a CSV file has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedveil.core.errors import DataError, nearest
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.npz_file import words
from fedveil.datasets.own.table import Table, count

if TYPE_CHECKING:
    import pandas as pd


def read_parquet(path: Path, data: Data, testing: bool = False) -> Table:
    """Read a Parquet file: a column of labels, and `text`, or columns of numbers, each a feature.

    Beside `text`, other columns are ignored; True is 1. Raise DataError as `read_table` does.
    """
    frame = _load(path)
    names = [str(name) for name in frame.columns]
    frame.columns = names
    label, group = data.label_column or "label", data.group_column
    source = None if testing and group not in names else group
    for needed in (label, *([source] if source else [])):
        if needed not in names:
            hint = "; name the column of labels with data.label_column" if needed == label else ""
            raise DataError(
                f"{path}: no column is called '{needed}'{nearest(needed, names)} ({', '.join(names)}){hint}"
            )
    if not len(frame):
        raise DataError(f"{path}: the file has columns and no examples")
    is_text = "text" in names and "text" not in (label, source)
    features = [name for name in names if name not in (label, source, "text" if is_text else None)]
    if not is_text and not features:
        raise DataError(f"{path}: beside its label an example needs a column 'text', or columns of numbers")
    for name in (label, *([source] if source else []), *(["text"] if is_text else features)):
        if frame[name].isna().any():
            row = int(np.argmax(frame[name].isna().to_numpy()))
            raise DataError(f"{_place(path, row)}, column {name}: missing; fill it in, or leave the row out")
    unread = f"{count(len(features), 'column')} beside the text not read: {', '.join(features[:5])}"
    return Table(
        "text" if is_text else "features",
        _words(path, label, frame[label]),
        lambda i: _place(path, i),
        _texts(path, frame["text"]) if is_text else None,
        None if is_text else np.stack([_numbers(path, name, frame[name]) for name in features], axis=1),
        () if is_text else tuple(features),
        _words(path, source, frame[source]) if source else None,
        (unread,) if is_text and features else (),
    )


def _load(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise DataError(
            f"{path}: a Parquet file is read by pyarrow, which is not installed: pip install '.[parquet]' in the checkout, or "
            "pip install pyarrow"
        ) from None
    except Exception as error:  # pyarrow raises whatever damaged bytes lead to
        raise DataError(f"{path}: is not a Parquet file that can be read: {error}") from None


def _place(path: Path, row: int) -> str:
    return f"{path}, row {row} (the first is 0)"


def _words(path: Path, name: str, values: pd.Series) -> list[str]:
    """Return a column of labels or sources as words."""
    found = np.asarray(values.to_list())
    return [word.strip() for word in words(f"{path}: column {name}", found)]


def _texts(path: Path, values: pd.Series) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{_place(path, row)}, column text: must be a text, it is {value!r}")
    return values.to_list()


def _numbers(path: Path, name: str, values: pd.Series) -> np.ndarray:
    """Return a column of numbers, float64 [n]; raise DataError where no float32 holds one, or it is no number."""
    found = np.asarray(values.to_list())
    if found.ndim != 1 or found.dtype.kind not in "fiub":
        raise DataError(
            f"{path}, column {name}: must be numbers, it is {values.dtype}; leave the column out, or name the column of text 'text'"
        )
    fits = np.abs(found.astype(np.float64)) <= np.finfo(np.float32).max
    if not fits.all():
        row = int(np.argmin(fits))
        raise DataError(f"{_place(path, row)}, column {name}: must be a finite number, it is {found[row]}")
    return found.astype(np.float64)
