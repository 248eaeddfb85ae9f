"""The reader of CSV files: columns `label` and `text`, or `label` and numbers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOBase
from itertools import islice
from pathlib import Path

import numpy as np

from fedveil.core.errors import DataError, nearest
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.csv_numbers import read_fast
from fedveil.datasets.own.table import Header, Table, count
from fedveil.datasets.own.text_file import decoded

SEPARATORS = (",", ";", "\t", "|")
TRUTH = {"true": 1.0, "false": 0.0}  # as pandas, Excel and R write them, in any case
LONGEST = 2**31 - 1  # characters of a cell; Python's own limit of 131,072 is shorter than an e-mail
BLOCK = 4096  # rows whose numbers are made at once


def read_csv(path: Path, data: Data, testing: bool = False) -> Table:
    """Read a CSV file with a header: a label and `text`, or a label and numbers, each a feature.

    Names of columns are found in any case. Beside `text`, other columns are ignored. True and False are 1 and 0.
    Raise DataError as `read_table` does.
    """
    header = _header(path, data, testing)
    if header.text is None and (fast := read_fast(path, data.encoding, header)):
        return _noted(fast, header)
    labels, texts, sources, lines = [], [], [], []
    blocks: list[np.ndarray] = []
    waiting: list[list[str]] = []  # rows whose numbers are not made yet
    empty = 0
    with _records(path, data.encoding, header.separator) as records:
        for line, row in records:
            if line <= header.line:
                continue
            if not any(cell.strip() for cell in row):
                empty += 1
                continue
            _check_width(f"{path}, line {line}", row, header)
            label = row[header.label].strip()
            if not label:
                raise DataError(
                    f"{path}, line {line}, column {header.names[header.label]}: empty; give each example a label or remove "
                    "the line"
                )
            labels.append(label)
            lines.append(line)
            if header.source is not None:
                sources.append(row[header.source].strip())
                if not sources[-1]:
                    raise DataError(
                        f"{path}, line {line}, column {header.names[header.source]}: empty; name each example's source"
                    )
            if header.text is not None:
                texts.append(row[header.text])
                continue
            waiting.append([row[i] for i in header.take])
            if len(waiting) == BLOCK:
                blocks.append(_numbers(path, waiting, lines, header))
                waiting = []
    if not labels:
        raise DataError(f"{path}: the file has a header and no examples")
    if waiting:
        blocks.append(_numbers(path, waiting, lines, header))
    notes = [f"{count(empty, 'empty row')} left out"] if empty else []
    if swallowed := [i for i, text in enumerate(texts) if _holds_examples(text, header, set(labels))]:
        notes.append(
            f"{count(len(swallowed), 'text')} with lines like examples in it, the first on line {lines[swallowed[0]]}: a quote "
            "that is closed too late?"
        )
    table = Table(
        "features" if header.text is None else "text",
        labels,
        lambda i: f"{path}, line {lines[i]}",
        None if header.text is None else texts,
        np.concatenate(blocks) if header.text is None else None,
        header.columns,
        None if header.source is None else sources,
        tuple(notes),
    )
    return _noted(table, header)


def _noted(table: Table, header: Header) -> Table:
    """Add to a table's notes the columns that were not read."""
    notes = list(table.notes)
    if tail := header.width - len(header.names):
        notes.append(f"{count(tail, 'empty column')} without a name left out")
    if header.text is not None:
        read = (header.label, header.text, header.source)
        unread = [name for i, name in enumerate(header.names) if i not in read]
        shown = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        notes += [f"{count(len(unread), 'column')} beside the text not read: {shown}"] if unread else []
    return replace(table, notes=tuple(notes))


def _header(path: Path, data: Data, testing: bool) -> Header:
    """Read the names of the columns; raise DataError where they are missing or cannot be told apart."""
    wanted = data.label_column or "label"
    separator = _separator(path, data, wanted)
    with _records(path, data.encoding, separator) as records:
        rows = ((line, row) for line, row in records if not _is_sep(row))
        line, cells = next(rows, (1, []))
        cells = [name.strip() for name in cells]
        place = f"{path}, line {line}"
        label = _find(wanted, cells)
        if label is None:
            raise DataError(_no_label(path, place, wanted, cells, list(islice(rows, 100))))
    named = max(i for i, name in enumerate(cells) if name) + 1
    names = tuple(cells[:named])
    if "" in names:
        at = names.index("")
        cause = " (an index that pandas or R wrote?)" if at == 0 else ""
        advice = (
            "leave it out, in pandas with to_csv(..., index=False), or name it"
            if at == 0
            else "name it, or leave it out"
        )
        raise DataError(f"{place}: column {at + 1} has no name{cause}; {advice}")
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{place}: more than one column is called '{min(repeated)}'")
    group = data.group_column
    source = None if group is None else _find(group, names)
    if group is not None and source is None and not testing:
        raise DataError(f"{place}: no column is called '{group}'{nearest(group, names)} ({', '.join(names)})")
    text = _find("text", names)
    text = None if text in (label, source) else text
    take = () if text is not None else tuple(i for i in range(named) if i not in (label, source))
    if text is None and not take:
        raise DataError(f"{place}: beside its label an example needs a column 'text', or columns of numbers")
    return Header(separator, line, names, len(cells), label, text, source, take)


def _separator(path: Path, data: Data, wanted: str) -> str:
    """Return the separator of the settings; else that of Excel's line `sep=;`, or the one by which a header has `wanted`.

    Where none gives such a column, it is the one that gives the most columns.
    """
    if data.separator is not None:
        return {"tab": "\t"}.get(data.separator, data.separator)
    with decoded(path, data.encoding) as stream:
        first = next((line for line in stream if line.strip()), "")
    if not first:
        raise DataError(f"{path}: the file is empty; it needs a first line that names its columns: label,text")
    if said := re.fullmatch(r"sep=([^\w\s\"]|\t)\s*", first):
        return said[1]

    def fitness(separator: str) -> tuple[bool, int]:
        names = [name.strip().strip('"') for name in first.split(separator)]
        return len(names) > 1 and _find(wanted, names) is not None, len(names)

    return max(SEPARATORS, key=fitness)


def _is_sep(row: list[str]) -> bool:
    """Say whether a row is Excel's line `sep=;`, as it reads with that separator."""
    return row[0] == "sep=" or bool(re.fullmatch(r"sep=\W", row[0]))


def _find(name: str, names: list[str] | tuple[str, ...]) -> int | None:
    """Return the index of a column by its name, in another case where only one column has it so; None without one."""
    if name in names:
        return names.index(name)
    alike = [i for i, other in enumerate(names) if other.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def _no_label(path: Path, place: str, wanted: str, names: list[str], rows: list[tuple[int, list[str]]]) -> str:
    """Say why a file has no column of labels: its first line may be an example, or something else above the header.

    rows: those that follow, with their lines
    """
    if not names:
        return f"{path}: the file is empty; it needs a first line that names its columns: label,text"
    lower = next((number for number, row in rows if _find(wanted, [cell.strip() for cell in row]) is not None), None)
    if lower is not None:
        return f"{place}: no column is called '{wanted}'; the names seem to stand on line {lower}: leave out the lines above it"
    again = [
        i
        for _, row in rows
        for i, (name, cell) in enumerate(zip(names, row, strict=False))
        if name and name == cell.strip()
    ]
    numbers = [name for name in names if not math.isnan(_number(name))]
    counted = numbers == [str(i + int(numbers[0] == "1")) for i in range(len(numbers))]  # as pandas names columns
    if again or (len(numbers) >= max(1, len(names) - 1) and not counted):
        return (
            f"{place}: no column is called '{wanted}', and this line seems to be an example ({', '.join(names)[:60]}); write a "
            "line above it that names the columns, as in label,text"
        )
    called = [name for name in names if name]
    shown = ", ".join(called)
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    return (
        f"{place}: no column is called '{wanted}'{nearest(wanted, called)} ({shown}); name the column of labels "
        f"with data.label_column"
    )


@contextmanager
def _records(path: Path, encoding: str | None, separator: str) -> Iterator[Iterator[tuple[int, list[str]]]]:
    """Open the rows of a CSV file that are not blank, each with the number of its first line."""
    before = csv.field_size_limit(LONGEST)
    try:
        with decoded(path, encoding) as stream:
            yield _rows(path, stream, separator)
    finally:
        csv.field_size_limit(before)


def _rows(path: Path, stream: TextIOBase, separator: str) -> Iterator[tuple[int, list[str]]]:
    lines: list[str] = []  # of the row that is being read

    def kept() -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            if "\0" in line:
                raise DataError(f"{path}, line {number}: a zero byte, which no text has; is it a file of another kind?")
            lines.append(line)
            yield line

    reader = csv.reader(kept(), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num - len(lines) + 1, row
            lines.clear()
    except csv.Error as error:
        opened = reader.line_num - len(lines) + _opened("".join(lines), separator)
        raise DataError(_broken(path, reader.line_num, opened, str(error))) from None


def _opened(text: str, separator: str) -> int:
    """Return the line of a row's text, from 1, on which its last quoted cell begins; 0 where none is quoted."""
    quoted = re.compile(rf'(?:^|(?<=[{re.escape(separator)}\r\n]))"[^"]*(?:""[^"]*)*"?')
    starts = [found.start() for found in quoted.finditer(text)]
    return len(text[: starts[-1]].splitlines()) + (text[: starts[-1]][-1:] in ("", "\n", "\r")) if starts else 0


def _broken(path: Path, line: int, opened: int, error: str) -> str:
    if "unexpected end" in error:
        return f"{path}, line {opened}: a quote is opened here and never closed; close it, or double it where it is part of a text"
    if "expected after" in error and opened < line:
        return (
            f"{path}, line {opened}: a quote is opened here, and the next one, on line {line}, does not end a value; close it, "
            "and double quotes that are part of a text"
        )
    if "expected after" in error:
        return f"{path}, line {line}: text follows a closing quote; double quotes that are part of a text"
    return f"{path}, line {line}: not CSV: {error}"


def _check_width(place: str, row: list[str], header: Header) -> None:
    """Raise DataError where a row does not have the header's columns; those without a name may be missing, or empty."""
    if not len(header.names) <= len(row) <= header.width:
        quotes = f"; a value that holds {header.separator!r} must stand in quotes" if len(row) > header.width else ""
        raise DataError(f"{place}: {len(row)} value(s), where the header names {len(header.names)} columns{quotes}")
    for i in range(len(header.names), len(row)):
        if row[i].strip():
            raise DataError(
                f"{place}: column {i + 1} has no name in the header and is not empty here ({row[i].strip()[:40]!r}); name it, "
                f"or put a text that holds {header.separator!r} in quotes"
            )


def _holds_examples(text: str, header: Header, labels: set[str]) -> bool:
    """Say whether a text of several lines holds one with as many values as the header, and a label among them."""
    inner = (line.split(header.separator) for line in text.splitlines()[1:]) if "\n" in text else ()
    return any(len(cells) == header.width and cells[header.label].strip() in labels for cells in inner)


def _numbers(path: Path, rows: list[list[str]], lines: list[int], header: Header) -> np.ndarray:
    """Return the features of the last rows that were read, float64 [n, d]; raise DataError where no float32 holds one."""
    try:
        numbers = np.array([list(map(float, row)) for row in rows], np.float64)
    except ValueError:
        numbers = np.array([list(map(_number, row)) for row in rows], np.float64)
    fits = np.abs(numbers) <= np.finfo(np.float32).max  # false for NaN
    if not fits.all():
        row, at = (int(i) for i in np.argwhere(~fits)[0])
        raise DataError(_not_finite(f"{path}, line {lines[len(lines) - len(rows) + row]}", rows[row][at], at, header))
    return numbers


def _not_finite(place: str, given: str, at: int, header: Header) -> str:
    said = f"'{given[:60]}{'...' * (len(given) > 60)}'" if given.strip() else "missing"
    advice = "correct it, leave the column out, or name the column of text 'text'"
    if re.fullmatch(r"\s*-?\d+,\d+\s*", given):
        advice = "write numbers with a decimal point, and without a mark for thousands"
    return f"{place}, column {header.columns[at]}: must be a finite number, it is {said}; {advice}"


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return TRUTH.get(value.strip().lower(), math.nan)
