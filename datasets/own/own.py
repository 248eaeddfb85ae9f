"""A user's data as a data set: one file or folder, or two, one of them to test on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.own.classes import indices, named_classes, one_spelling, other_spelling
from fedveil.datasets.own.files import read_table
from fedveil.datasets.own.image_folder import train_and_test
from fedveil.datasets.own.table import Table, count
from fedveil.datasets.scaling import scaling
from fedveil.datasets.text import OF_TEXT, distinct, text_dataset

OF_FILES = ("label_column", "separator", "encoding", "merge_labels")  # keys of [data]


@part(
    tasks=("classification",),
    uses=("path", "test_path", "group_column", "labels", "scale", "ranges", *OF_FILES, *OF_TEXT),
)
def own(data: Data) -> DataSet:
    """Load `data.path`: a CSV of `label,text` or of `label` and numbers, an .npz or Parquet file, or a folder of images.

    The test part is `data.test_path`; else `path/test`, where a folder has `train` and `test`; else a fixed, stratified
    part of `data.test_fraction`. `data.labels` sets the classes and their order; without it they are sorted. Features are
    scaled as `data.scale` says. Exact repeats among training texts are dropped if `data.drop_duplicates`.
    Raise DataError that names the file, the line or column, and what to do; SettingsError without a path.
    """
    if data.path is None:
        raise SettingsError(
            "data.path: data.dataset = 'own' needs the path of a CSV file, an .npz file, or a folder of images"
        )
    path = Path(data.path).expanduser()
    test_path = None if data.test_path is None else Path(data.test_path).expanduser()
    files: list[str] = []
    if test_path is None and (halves := train_and_test(path)):
        path, test_path, beside = halves
        files += beside
    tables = [read_table(path, data)]
    if test_path is not None:
        tables.append(_fitting(read_table(test_path, data, testing=True), tables[0], test_path))
    named = named_classes(data)
    tables, merged = one_spelling(tables, data, named)
    table, test = tables[0], tables[1] if len(tables) > 1 else None
    files += [*table.notes, *(f"test data: {note}" for note in (test.notes if test else ())), *merged]
    classes = _classes(table, test, path, named)
    labels = indices(table, classes)
    kept = np.arange(len(labels))
    if table.texts is not None and data.drop_duplicates:
        kept = distinct(labels.tolist(), table.texts)
        repeats = len(labels) - len(kept)
        files += [f"{count(repeats, 'exact repeat')} left out"] if repeats else []
    if test is None:
        train_part, test_part = splits.stratified(labels[kept], data.test_fraction)
        split = (kept[train_part], kept[test_part])
    else:
        split = (kept, len(labels) + np.arange(len(test.labels)))
        labels = np.concatenate([labels, indices(test, classes)])
    group_names = tuple(sorted(set(table.sources or ())))
    groups = None
    if table.sources is not None:
        number = {name: i for i, name in enumerate(group_names)}
        groups = np.array([number[name] for name in table.sources], np.int64)
    if table.kind != "features":
        check_unscaled(table.kind, data)
    if table.texts is not None:
        texts = table.texts + (test.texts or [] if test else [])
        made = text_dataset("own", texts, labels, classes, split, data, groups=groups, group_names=group_names)
        return replace(made, files=tuple(files))
    parts = [t.features for t in (table, test) if t is not None and t.features is not None]
    features, found = parts[0] if len(parts) == 1 else np.concatenate(parts), None
    notes: tuple[str, ...] = ()
    if table.kind == "features":
        found, notes = scaling(features, split[0], table.columns, data)
        features = found(features) if found else features.astype(np.float32, copy=False)
    examples = Examples(features, labels)
    task = Task("images" if table.kind == "images" else "features", examples.features.shape[1:], classes)
    train = examples.take(split[0])
    return DataSet(
        "own",
        task,
        train,
        examples.take(split[1]),
        None if groups is None else groups[split[0]],
        group_names,
        columns=table.columns,
        scaling=found,
        notes=notes,
        files=tuple(files),
    )


def check_unscaled(kind: str, data: Data) -> None:
    """Raise SettingsError where the settings ask to scale what is not scaled."""
    for key in ("scale", "ranges"):
        value = getattr(data, key)
        if value not in ("auto", None):
            raise SettingsError(
                f"data.{key} = {value!r}: scales columns of features, and the data are {kind}; leave it out"
            )


def _fitting(test: Table, table: Table, path: Path) -> Table:
    """Return the test table, its columns in the training table's order; raise DataError where it does not fit that."""
    if test.kind != table.kind:
        raise DataError(f"{path}: test data is {test.kind}, where the training data is {table.kind}")
    if test.features is None or table.features is None:
        return test
    if table.columns and test.columns:
        missing = [name for name in table.columns if name not in test.columns]
        if missing:
            raise DataError(f"{path}: no column is called '{missing[0]}', as in the training data")
        order = [test.columns.index(name) for name in table.columns]
        more = [name for name in test.columns if name not in table.columns]
        left = (
            (f"{count(len(more), 'column')} that training data lacks left out: {', '.join(more[:5])}",) if more else ()
        )
        return replace(test, features=test.features[:, order], columns=table.columns, notes=(*test.notes, *left))
    if test.features.shape[1:] != table.features.shape[1:]:
        raise DataError(
            f"{path}: an example has shape {test.features.shape[1:]}, where in the training data it has "
            f"{table.features.shape[1:]}"
        )
    return test


def _classes(table: Table, test: Table | None, path: Path, named: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the classes in order; raise DataError where there are fewer than 2, or only test data has one of them."""
    seen = set(table.labels)
    classes = named or tuple(sorted(seen, key=_order))
    if len(seen) < 2:
        raise DataError(f"{path}: examples of at least 2 classes are needed; all are '{next(iter(seen))}'")
    if test is not None and not seen.issuperset(test.labels):
        i, label = next((i, label) for i, label in enumerate(test.labels) if label not in seen)
        hint = other_spelling(label, seen)
        raise DataError(f"{test.place(i)}: label '{label}' does not occur in the training data {path}{hint}")
    return classes


def _order(label: str) -> tuple[int, int, str]:
    """Return the key that sorts whole numbers by value, before words in alphabetical order."""
    return (0, int(label), label) if re.fullmatch(r"-?\d{1,18}", label) else (1, 0, label)
