"""The classes of a user's data: their names and order, and several spellings of one."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import chain

import numpy as np

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.table import Table, count

MISSING = ("", "nan", "<na>", "nat", "n/a", "#n/a", "null")  # how programs write that a value is missing
NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(e[+-]?\d{1,3})?", re.ASCII)


def named_classes(data: Data) -> tuple[str, ...] | None:
    """Return `data.labels`; raise SettingsError where it names fewer than two classes, or one twice."""
    classes = data.labels
    if classes is not None and (len(set(classes)) != len(classes) or len(classes) < 2):
        raise SettingsError(f"data.labels = {list(classes)}: name at least 2 classes, each once")
    if classes is not None and data.merge_labels and len({spelled(name) for name in classes}) < len(classes):
        raise SettingsError(f"data.labels = {list(classes)}: with data.merge_labels, two of these are one class")
    return classes


def spelled(label: str) -> str | Decimal:
    """Return what all spellings of a class share: `"Ham"`, `"ham "`, `"HAM"` are one, and so are `"1"` and `"1.0"`.

    Case, width, spaces, marks of composition and invisible characters are taken away; numbers are compared by value.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    visible = (c for c in text if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    text = " ".join("".join(visible).split())
    return Decimal(text) if NUMBER.fullmatch(text) else text


def one_spelling(tables: Sequence[Table], data: Data, classes: tuple[str, ...] | None) -> tuple[list[Table], list[str]]:
    """Return the tables with one spelling for each class, and a note where `data.merge_labels` changed some.

    classes: the names that count, where settings give them; else the most frequent spelling is the name, and of numbers
        the shortest
    Raise DataError, with the spellings and how often each occurs, where one class has several and they are not merged;
    and where a label says that a value is missing.
    """
    counts = Counter(chain.from_iterable(table.labels for table in tables))
    if classes is None:
        _check_missing(tables, counts)
    shared: dict[str | Decimal, list[str]] = {}
    for label in [*(classes or ()), *sorted(counts, key=lambda label: _rank(label, counts[label]))]:
        shared.setdefault(spelled(label), []).append(label)
    several = [group for group in shared.values() if len(set(group)) > 1]
    if not data.merge_labels:
        if classes is None and several:
            raise DataError(_refusal(tables, several, counts))
        return list(tables), []
    names = {label: group[0] for group in several for label in group}
    merged = [replace(table, labels=[names.get(label, label) for label in table.labels]) for table in tables]
    changed = {label: n for label, n in sorted(counts.items()) if names.get(label, label) != label}
    shown = ", ".join(f"{_shown(label, changed)} as {_shown(names[label], ())}" for label in list(changed)[:5])
    more = ", ..." if len(changed) > 5 else ""
    note = f"{count(sum(changed.values()), 'label')} spelled another way read as one: {shown}{more}"
    return merged, [note] if changed else []


def _rank(label: str, frequency: int) -> tuple[int, int, str]:
    """Return the key that sorts the spelling first by which a class is called."""
    length = len(label) if isinstance(spelled(label), Decimal) else 0
    return length, -frequency, label.swapcase()  # of equal ones lower case


def indices(table: Table, classes: tuple[str, ...], of: str = "data.labels") -> np.ndarray:
    """Return labels as indices into the classes, int64 [n]; raise DataError, with its place, for any other label.

    of: the origin of the classes, for the message
    """
    number = {name: i for i, name in enumerate(classes)}
    unknown = set(table.labels) - set(classes)
    if unknown:
        at = next(i for i, label in enumerate(table.labels) if label in unknown)
        label = table.labels[at]
        raise DataError(
            f"{table.place(at)}: label {_quoted(label)} is not one of {of} ({', '.join(classes)}){other_spelling(label, classes)}"
        )
    return np.fromiter(map(number.__getitem__, table.labels), np.int64, len(table.labels))


def other_spelling(label: str, classes: Iterable[str]) -> str:
    """Return words for an error: which class `label` may be another spelling of; nothing where it is of none."""
    alike = [name for name in classes if spelled(name) == spelled(label)]
    return f"; data.merge_labels = true reads it as '{alike[0]}'" if alike else ""


def _check_missing(tables: Sequence[Table], counts: Counter[str]) -> None:
    wrong = {label for label in counts if spelled(label) in MISSING or label == "NA"}
    for table in tables if wrong else ():
        for i, label in enumerate(table.labels):
            if label in wrong:
                raise DataError(
                    f"{table.place(i)}: label {_quoted(label)} ({count(counts[label], 'example')}) is how a missing value is "
                    "written; leave such examples out, or, where it is a class, name all classes in data.labels"
                )


def _refusal(tables: Sequence[Table], several: list[list[str]], counts: Counter[str]) -> str:
    """Say which classes are spelled in several ways, how often each spelling occurs, and where the first odd one is."""
    lines = []
    for group in several[:5]:
        told = [f"{_shown(label, group)} ({counts[label]:,})" for label in group[:6]]
        lines.append(f"\n  {', '.join(told)}{', ...' if len(group) > 6 else ''}")
    lines += [f"\n  and {len(several) - 5:,} more"] if len(several) > 5 else []
    odd = several[0][1]
    place = next(table.place(table.labels.index(odd)) for table in tables if odd in table.labels)
    return (
        f"{place}: label {_shown(odd, several[0])} is another spelling of {_shown(several[0][0], several[0])}; with the number of "
        f"examples of each:{''.join(lines)}\n  data.merge_labels = true takes spellings for one class; or correct them, or "
        "name each class in data.labels"
    )


def _quoted(label: str) -> str:
    """Return a label in quotes, cut where it is long, with invisible characters written out."""
    label = label if len(label) <= 60 else f"{label[:60]}..."
    return f"'{label}'" if label.isprintable() else repr(label)


def _shown(label: str, others: Iterable[str]) -> str:
    """Return a label in quotes, by its code points where it would look like another one of `others`."""
    composed = unicodedata.normalize("NFC", label)
    alike = any(other != label and unicodedata.normalize("NFC", other) == composed for other in others)
    return ascii(label) if alike else _quoted(label)
