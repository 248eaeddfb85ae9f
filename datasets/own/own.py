"""A user's data as a data set: one file or folder, or two, one of them to test on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.own.files import Table, read_table
from fedveil.datasets.scaling import scaling
from fedveil.datasets.text import OF_TEXT, distinct, text_dataset


@part(tasks=("classification",), uses=("path", "test_path", "group_column", "labels", "scale", "ranges", *OF_TEXT))
def own(data: Data) -> DataSet:
    """Load `data.path`: a CSV of `label,text`, a CSV of `label` and numbers, an .npz file, or a folder of images.

    The test part is `data.test_path`; else `path/test`, where a folder has `train` and `test`; else a fixed, stratified
    part of `data.test_fraction`. Features are scaled as `data.scale` says. `data.labels` sets the classes and their order; without it they are sorted. Exact
    repeats among training texts are dropped if `data.drop_duplicates`.
    Raise DataError that names the file, the line or column, and what to do; SettingsError without a path.
    """
    if data.path is None:
        raise SettingsError(
            "data.path: data.dataset = 'own' needs the path of a CSV file, an .npz file, or a folder of images"
        )
    path = Path(data.path).expanduser()
    test_path = None if data.test_path is None else Path(data.test_path).expanduser()
    if test_path is None and (path / "train").is_dir() and (path / "test").is_dir():
        path, test_path = path / "train", path / "test"
    table = read_table(path, data.group_column)
    test = None
    if test_path is not None:
        test = _fitting(read_table(test_path, data.group_column, testing=True), table, test_path)
    classes = _classes(table, test, path, data)
    labels = indices(table, classes)
    kept = np.arange(len(labels))
    if table.texts is not None and data.drop_duplicates:
        kept = distinct(labels.tolist(), table.texts)
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
        return text_dataset("own", texts, labels, classes, split, data, groups=groups, group_names=group_names)
    parts = [t.features for t in (table, test) if t is not None and t.features is not None]
    features, found = np.concatenate(parts), None
    notes: tuple[str, ...] = ()
    if table.kind == "features":
        found, notes = scaling(features, split[0], table.columns, data)
        features = found(features) if found else features.astype(np.float32)
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
        columns=tuple(table.columns or ()),
        scaling=found,
        notes=notes,
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
        return Table(test.kind, test.labels, test.place, features=test.features[:, order], columns=table.columns)
    if test.features.shape[1:] != table.features.shape[1:]:
        raise DataError(
            f"{path}: an example has shape {test.features.shape[1:]}, where in the training data it has "
            f"{table.features.shape[1:]}"
        )
    return test


def _classes(table: Table, test: Table | None, path: Path, data: Data) -> tuple[str, ...]:
    """Return the classes in order; raise DataError where there are fewer than 2, or only test data has one of them."""
    seen = set(table.labels)
    classes = named_classes(data) or tuple(sorted(seen, key=_order))
    if len(seen) < 2:
        raise DataError(f"{path}: examples of at least 2 classes are needed; all are '{next(iter(seen))}'")
    if test is not None:
        for i, label in enumerate(test.labels):
            if label not in seen:
                raise DataError(f"{test.place(i)}: label '{label}' does not occur in the training data {path}")
    return classes


def named_classes(data: Data) -> tuple[str, ...] | None:
    """Return `data.labels`; raise SettingsError where it names fewer than two classes, or one twice."""
    classes = data.labels
    if classes is not None and (len(set(classes)) != len(classes) or len(classes) < 2):
        raise SettingsError(f"data.labels = {list(classes)}: name at least 2 classes, each once")
    return classes


def indices(table: Table, classes: tuple[str, ...], of: str = "data.labels") -> np.ndarray:
    """Return labels as indices into the classes, int64 [n]; raise DataError, with its place, for any other label.

    of: the origin of the classes, for the message
    """
    number = {name: i for i, name in enumerate(classes)}
    for i, label in enumerate(table.labels):
        if label not in number:
            raise DataError(f"{table.place(i)}: label '{label}' is not one of {of} ({', '.join(classes)})")
    return np.array([number[label] for label in table.labels], np.int64)


def _order(label: str) -> tuple[int, int, str]:
    """Return the key that sorts whole numbers by value, before words in alphabetical order."""
    return (0, int(label), label) if re.fullmatch(r"-?\d{1,18}", label) else (1, 0, label)
