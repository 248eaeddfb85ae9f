"""A file or folder of any kind is read, or named as what it is; what of it is left out is counted."""

from __future__ import annotations

import io
import json
import os
import pickle
import sqlite3
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.files import read_table
from fedveil.datasets.own.own import own
from fedveil.simulations.display import Display
from fedveil.simulations.run import run

TWO = np.array([0, 1, 0, 1])


def refused(path, **settings) -> str:
    with pytest.raises(DataError) as error:
        read_table(path, Data(**settings))
    assert str(error.value).startswith(str(path))
    return str(error.value)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def picture(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2), np.uint8) if pixels is None else pixels).save(path)


def zipped(*names) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((3, 2)))
    return file.getvalue()


def database(tmp_path) -> bytes:
    with sqlite3.connect(tmp_path / "made") as connection:
        connection.execute("create table t (label, text)")
    connection.close()
    return (tmp_path / "made").read_bytes()


# what is not read is named


@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.xlsx",
            zipped("[Content_Types].xml", "xl/workbook.xml"),
            "a spreadsheet, which is not read; write it as CSV",
        ),
        ("a.ods", zipped("mimetype", "content.xml"), "a spreadsheet"),
        ("a.XLS", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet"),
        ("a.json", json.dumps([{"label": "x", "text": "a"}]).encode(), "JSON, which is not read"),
        ("a.jsonl", b'{"label": "x"}\n{"label": "y"}\n', "JSON"),
        ("a.zip", zipped("mail.csv", "notes.txt"), "a zip archive, which is not read (mail.csv, notes.txt); unpack it"),
        ("a.pkl", pickle.dumps({"label": 1}), "a pickle, which can run code"),
        ("a.npy", npy(), "a single NumPy array, which is not read; save it with np.savez"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("a.zst", b"\x28\xb5\x2f\xfd\x04\x00", "packed by Zstandard"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "one image, which is not read; give the folder that holds a folder of images"),
        ("a.feather", b"ARROW1\0\0", "an Arrow file"),
    ],
)
def test_a_file_of_another_kind_is_named_by_its_content_or_its_ending(tmp_path, name, content, said, ending):
    path = tmp_path / (name if ending else "data.csv")
    path.write_bytes(content)
    assert said in refused(path)


@pytest.mark.parametrize(
    "name", ["a.xlsx", "a.JSON", "a.tar.gz", "a.pt", "a.rds", "a.mat", "a.Feather", "a.zip", "a.tgz"]
)
def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "is " in refused(tmp_path / name)


def test_a_database_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(database(tmp_path))
    assert "a database" in refused(tmp_path / "a.csv")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    assert "is a pipe or device" in refused(tmp_path / "a.csv")


# arrays


@pytest.mark.parametrize("name", ["a.npz", "a.NPZ", "a.zip", "arrays"])
def test_arrays_are_read_whatever_they_are_called(tmp_path, name):
    (tmp_path / name).write_bytes(npz(features=np.eye(4), labels=TWO))
    assert read_table(tmp_path / name, Data()).features.tolist() == np.eye(4).tolist()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (TWO.astype(bool), ["False", "True", "False", "True"]),
        (TWO.astype(np.float64), ["0", "1", "0", "1"]),
        (TWO.astype(np.uint8), ["0", "1", "0", "1"]),
        (np.array([b"ham", "\u00e9".encode(), b"ham", b"x"]), ["ham", "\u00e9", "ham", "x"]),
    ],
)
def test_labels_of_any_plain_type_are_words(tmp_path, labels, words):
    (tmp_path / "a.npz").write_bytes(npz(features=np.ones((4, 2), bool), labels=labels))
    table = read_table(tmp_path / "a.npz", Data())
    assert table.labels == words
    assert table.features.tolist() == [[1.0, 1.0]] * 4


def test_another_array_of_labels_is_named_by_the_settings(tmp_path):
    (tmp_path / "a.npz").write_bytes(npz(features=np.eye(4), label=TWO, labels2=TWO))
    assert "did you mean" in refused(tmp_path / "a.npz")
    assert "name the array of labels with data.label_column" in refused(tmp_path / "a.npz")
    assert read_table(tmp_path / "a.npz", Data(label_column="label")).labels == ["0", "1", "0", "1"]


def test_an_array_that_is_called_an_archive_is_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(npy())
    assert "a single NumPy array" in refused(tmp_path / "a.npz")


def test_an_array_that_claims_to_be_huge_is_refused(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999999), }"
    header += b" " * (117 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("features.npy", content)
        archive.writestr("labels.npy", content)
    assert "cannot be read" in refused(tmp_path / "a.npz")


@pytest.mark.parametrize("key", ["separator", "encoding"])
def test_a_setting_of_csv_files_is_refused_for_others(tmp_path, key):
    (tmp_path / "a.npz").write_bytes(npz(features=np.eye(4), labels=TWO))
    picture(tmp_path / "images" / "a" / "1.png")
    data = Data(**{key: {"separator": ";", "encoding": "cp1252"}[key]})
    for path in (tmp_path / "a.npz", tmp_path / "images"):
        with pytest.raises(SettingsError, match=f"data.{key} = .*has no effect"):
            read_table(path, data)
        read_table(path, data, testing=True)


# Parquet


def parquet(path, **columns):
    pytest.importorskip("pyarrow")
    pd.DataFrame(columns).to_parquet(path)
    return path


def test_a_parquet_file_is_what_the_same_csv_is(tmp_path):
    rng = np.random.default_rng(0)
    columns = {"label": list("xyxy"), "a": rng.random(4), "b": [True, False, True, True], "c": rng.integers(0, 9, 4)}
    path = parquet(tmp_path / "a.PARQUET", **columns)
    pd.DataFrame(columns).to_csv(tmp_path / "a.csv", index=False)
    made, other = read_table(path, Data()), read_table(tmp_path / "a.csv", Data())
    assert made.features.tobytes() == other.features.tobytes()
    assert (made.labels, made.columns, made.kind) == (other.labels, other.columns, other.kind)
    texts = parquet(tmp_path / "t.pq", kind=[1.0, 2.0], text=["a", "b"], id=[7, 8])
    table = read_table(texts, Data(label_column="kind"))
    assert (table.labels, table.texts) == (["1", "2"], ["a", "b"])
    assert table.notes == ("1 column beside the text not read: id",)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"labels": ["x"], "a": [1.0]},
            "no column is called 'label'; did you mean 'labels'? (labels, a); name the column",
        ),
        ({"label": ["x", None], "a": [1.0, 2.0]}, "row 1 (the first is 0), column label: missing"),
        ({"label": ["x", "y"], "a": [1.0, None]}, "row 1 (the first is 0), column a: missing"),
        (
            {"label": ["x", "y"], "a": [1.0, np.inf]},
            "row 1 (the first is 0), column a: must be a finite number, it is inf",
        ),
        ({"label": ["x", "y"], "a": ["u", "v"]}, "column a: must be numbers"),
        ({"label": ["x", "y"], "text": [1, 2]}, "column text: must be a text, it is 1"),
        ({"label": [0.5, 1.0], "a": [1.0, 2.0]}, "column label must be whole numbers or words"),
        ({"label": ["x"]}, "beside its label an example needs"),
        ({"label": [], "a": []}, "columns and no examples"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_refused_with_its_place(tmp_path, columns, said):
    assert said in refused(parquet(tmp_path / "a.parquet", **columns))


def test_a_damaged_parquet_file_is_refused(tmp_path):
    whole = parquet(tmp_path / "a.parquet", label=["x", "y"], a=[1.0, 2.0]).read_bytes()
    for content in (b"", b"PAR1", whole[:-20], whole[:60] + b"\xff" * 20 + whole[80:]):
        (tmp_path / "b.parquet").write_bytes(content)
        refused(tmp_path / "b.parquet")


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    def missing(*_, **__):
        raise ImportError

    monkeypatch.setattr(pd, "read_parquet", missing)
    assert "pip install pyarrow" in refused(tmp_path / "a.parquet")


# folders of images


def test_what_lies_in_a_folder_of_images_and_is_not_read_is_counted(tmp_path):
    for i in range(3):
        picture(tmp_path / "cat" / f"{i}.png")
        picture(tmp_path / "dog" / f"{i}.PNG")
        picture(tmp_path / "cat" / "more" / "deep" / f"{i}.png")
    for name in ("notes.txt", "one.heic", ".DS_Store"):
        (tmp_path / "dog" / name).write_text("x")
    table = read_table(tmp_path, Data())
    assert (len(table.labels), table.notes) == (
        6,
        ("3 images in folders below a class left out", "2 files that are no images of a known kind left out"),
    )


def test_only_the_first_frame_of_an_image_is_read_and_that_is_said(tmp_path):
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (0, 51, 102)]
    (tmp_path / "a").mkdir()
    frames[1].save(tmp_path / "a" / "1.tif", save_all=True, append_images=frames[2:])
    table = read_table(tmp_path, Data())
    assert table.features.ravel().tolist() == [pytest.approx(0.2)] * 4
    assert table.notes == ("1 frame after an image's first left out",)


def test_folders_of_train_and_test_are_found_in_any_case_and_others_are_counted(tmp_path):
    for part, number in (("Train", 3), ("TEST", 2), ("val", 2)):
        for label in "ab":
            for i in range(number):
                picture(tmp_path / part / label / f"{i}.png")
    made = own(Data(dataset="own", path=str(tmp_path)))
    assert (made.task.classes, len(made.train), len(made.test)) == (("a", "b"), 6, 4)
    assert made.files == ("1 folder beside train and test not read: val",)


def test_images_without_a_folder_for_their_class_are_named(tmp_path):
    picture(tmp_path / "1.png")
    assert "1 image of no class, as 1.png; it must hold one folder a class" in refused(tmp_path)


def test_images_that_all_lie_deeper_are_named(tmp_path):
    picture(tmp_path / "data" / "cat" / "1.png")
    said = refused(tmp_path)
    assert f"further down 1 image, as {tmp_path / 'data' / 'cat' / '1.png'}" in said


def test_a_folder_that_holds_a_table_names_its_path(tmp_path):
    (tmp_path / "mail.csv").write_text("label,text\nx,a\n")
    assert f"to read mail.csv, give its path: {tmp_path / 'mail.csv'}" in refused(tmp_path)


def test_a_damaged_png_is_refused(tmp_path):
    picture(tmp_path / "a" / "1.png", np.random.default_rng(0).integers(256, size=(30, 30), dtype=np.uint8))
    content = bytearray((tmp_path / "a" / "1.png").read_bytes())
    content[60] ^= 255
    (tmp_path / "a" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        read_table(tmp_path, Data())
    chunk = b"IHDR" + (10**6).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a" / "1.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        read_table(tmp_path, Data())


# where what is left out is told

LOST = 'label,text,,\nham,"see, you",,\nham,"see, you",,\n,,,\nspam,win now,,\nspam,win a prize,,\nHam,hello,,\nham,bye,,\n'
TOLD = (
    "1 empty row left out",
    "2 empty columns without a name left out",
    "1 label spelled another way read as one: 'Ham' as 'ham'",
    "1 exact repeat left out",
)


def test_what_is_left_out_is_a_line_of_the_run_and_of_its_record(tmp_path):
    (tmp_path / "a.csv").write_text(LOST)
    settings = {
        "data.dataset": "own", "data.path": str(tmp_path / "a.csv"), "data.merge_labels": True, "data.clients": 1,
        "federation.cohort": 1, "federation.rounds": 1, "engine": "sequential",
    }  # fmt: skip
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    result = run(Experiment.preset("spam-demo").override(settings), out=tmp_path / "run", display=display, plots=False)
    assert f"\nfiles    {'; '.join(TOLD)}\n" in said.getvalue()
    assert json.loads((result.run_dir / "environment.json").read_text())["files"] == list(TOLD)
    quiet = run(Experiment.preset("digits").override({"federation.rounds": 1}), out=tmp_path / "other", plots=False)
    assert "files" not in json.loads((quiet.run_dir / "environment.json").read_text())
