"""A user's file that is damaged in any way gives a clear error or the right value, and never a traceback or a warning."""

from __future__ import annotations

import csv
import io
import math
import warnings
import zipfile
from importlib import resources

import numpy as np
import pytest
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedveil.core.catalog import PRESETS
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.files import read_table
from fedveil.datasets.own.own import own

PIECES = [
    b'"', b",", b";", b"\t", b"|", b"\n", b"\r\n", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xc3\xa9", b"\xe2\x80\x8b",
    b"label", b"text", b"sep=;\n", b"nan", b"inf", b"1e999", b"True", b"-0", b"1,5", b" ", b"'", b"[", b"]", b"=", b"{", b"}", b"#",
    b"9" * 400, b"[" * 400, b"\\u0000", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x1f\x8b\x08", b"BZh91AY&SY", b"IDAT", b"\x93NUMPY",
]  # fmt: skip
CHANGE = st.tuples(
    st.sampled_from(["put", "over", "cut", "flip", "again"]),
    st.floats(0, 1),
    st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=6)),
)


def changed(content: bytes, changes) -> bytes:
    """Change bytes: put a piece in, or over what is there, cut some out, flip bits, or write a part again."""
    for how, where, piece in changes:
        at, n = int(where * len(content)), len(piece)
        if how == "put":
            content = content[:at] + piece + content[at:]
        elif how == "over":
            content = content[:at] + piece + content[at + n :]
        elif how == "cut":
            content = content[:at] + content[at + 7 * n :]
        elif how == "again":
            content = content[:at] + content[at // 2 : at] + content[at:]
        else:
            content = content[:at] + bytes(byte ^ piece[0] for byte in content[at : at + 1]) + content[at + 1 :]
    return content


CHANGES = st.lists(CHANGE, min_size=1, max_size=4)
TEXTS = 'label,text\nspam,"Win, ""now"""\nham,see you\nham,"two\nlines"\nspam,\nham,caf\u00e9\nspam,b\n'.encode()
NUMBERS = b"a,label,b\n1,x,2.5\n-3,y,1e3\n5,x,-6\n0.25,y,7\n8,x,9\n1,y,0\n"


def attempt(action):
    """Return what an action gives, or None for a refusal that says something; a warning fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return action()
        except (DataError, SettingsError) as error:
            refusal = str(error)
    assert len(refusal) > 20
    return None


def sound(table) -> None:
    n = len(table.labels)
    assert n > 0
    if table.texts is not None:
        assert len(table.texts) == n
    else:
        assert len(table.features) == n
        assert table.features.dtype == (np.float32 if table.kind == "images" else np.float64)
        assert np.isfinite(table.features).all()
    table.place(n - 1)


def rows_of(content: bytes) -> list[list[str]] | None:
    """The rows by Python's own reader, where it reads the content as it stands."""
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    return [row for row in rows if any(cell.strip() for cell in row)]


def number(cell: str) -> float:
    return {"true": 1.0, "false": 0.0}.get(cell.strip().lower(), math.nan) if cell.strip().isalpha() else float(cell)


@parses("own CSV of texts", "own CSV of numbers", usual=60)
@given(st.sampled_from([TEXTS, NUMBERS]), CHANGES)
def test_a_damaged_csv_is_refused_or_what_pythons_reader_makes_of_it(tmp_path_factory, content, changes):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(content := changed(content, changes))
    table = attempt(lambda: read_table(path, Data()))
    attempt(lambda: own(Data(dataset="own", path=str(path), merge_labels=len(changes) % 2 == 0)))
    if table is None:
        return
    sound(table)
    assert all(label.strip() for label in table.labels)
    rows = None if content.startswith((b"\xff\xfe", b"\x1f\x8b")) or b"sep=" in content[:9] else rows_of(content)
    if not rows or len(rows[0]) < 2:  # another separator than the comma
        return
    names = [cell.strip() for cell in rows[0]]
    if "label" not in names:
        return
    assert table.labels == [row[names.index("label")].strip() for row in rows[1:]]
    if table.texts is not None:
        at = next(i for i, name in enumerate(names) if name.lower() == "text")
        assert table.texts == [row[at] for row in rows[1:]]
    else:
        take = [names.index(name) for name in table.columns]
        expected = np.array([[number(row[i]) for i in take] for row in rows[1:]])
        assert np.array_equal(table.features, expected)


@parses("own settings in TOML", usual=60)
@given(st.sampled_from(sorted(PRESETS)), CHANGES)
def test_damaged_settings_are_refused_or_settings_that_survive_toml(tmp_path_factory, name, changes):
    text = resources.files("fedveil.simulations.presets").joinpath(f"{name}.toml").read_bytes()
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_bytes(changed(text, changes))
    experiment = attempt(lambda: Experiment.load(path))
    if experiment is not None:
        assert Experiment.parse(experiment.toml()) == experiment


def archive(arrays: dict[str, bytes]) -> bytes:
    """An .npz file of these contents of .npy files, with the checksums that they have."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in arrays.items():
            made.writestr(zipfile.ZipInfo(f"{name}.npy"), content)
    return file.getvalue()


def array(values) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


FEATURES, LABELS = array(np.arange(18, dtype=np.float32).reshape(6, 3)), array(np.array(list("xyxyxy")))
PIXELS = array(np.arange(24, dtype=np.uint8).reshape(6, 2, 2))


@parses("own .npz", usual=60)
@given(st.sampled_from([FEATURES, PIXELS]), CHANGES, st.sampled_from(["archive", "features", "labels"]))
def test_a_damaged_npz_is_refused_or_read(tmp_path_factory, features, changes, what):
    labels = changed(LABELS, changes) if what == "labels" else LABELS
    features = changed(features, changes) if what == "features" else features
    content = archive({"features": features, "labels": labels})
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(changed(content, changes) if what == "archive" else content)
    table = attempt(lambda: read_table(path, Data()))
    attempt(lambda: own(Data(dataset="own", path=str(path))))
    if table is None or table.kind != "features" or features is not FEATURES or what == "archive":
        return
    sound(table)
    assert table.features.ravel().tolist() == list(range(18))


def image(ending: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    return file.getvalue()


IMAGES = {ending: image(ending) for ending in ("png", "jpg", "bmp", "gif", "webp", "tif")}


@parses("own folder of images", usual=60)
@given(st.sampled_from(sorted(IMAGES)), CHANGES)
def test_a_damaged_image_is_refused_or_read(tmp_path_factory, ending, changes):
    folder = tmp_path_factory.mktemp("images")
    for name, content in (("x", changed(IMAGES[ending], changes)), ("y", IMAGES[ending])):
        (folder / name).mkdir()
        (folder / name / f"1.{ending}").write_bytes(content)
    table = attempt(lambda: read_table(folder, Data()))
    if table is not None:
        sound(table)
        assert table.features.shape == (2, 3, 6, 6)
        assert table.features.min() >= 0
        assert table.features.max() <= 1


@pytest.mark.parametrize("content", [TEXTS, NUMBERS])
def test_the_files_that_are_damaged_are_read_when_they_are_whole(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    sound(read_table(tmp_path / "a.csv", Data()))
