"""The record of a run: made once, never half-written, cut back to whole rounds."""

from __future__ import annotations

import json
import os
from hashlib import sha256

import pytest

from fedveil import Experiment, SettingsError
from fedveil.core.record import Record, write_atomically


def test_a_new_record_holds_settings_and_environment(tmp_path) -> None:
    record = Record.create(Experiment.preset("digits"), tmp_path / "run", ["fedveil", "run"])
    assert Experiment.load(record.path("experiment.toml")) == Experiment.preset("digits")
    environment = json.loads(record.path("environment.json").read_text())
    assert environment["command"] == ["fedveil", "run"]
    assert environment["versions"]["torch"]
    assert environment["device"] == "auto"


def test_without_a_folder_the_record_is_named_after_experiment_and_time_and_never_reused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {Record.create(Experiment.preset("digits")).folder for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent.name == "runs" and folder.name.startswith("digits-") for folder in folders)


def test_a_folder_that_exists_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(SettingsError, match="exists already"):
        Record.create(Experiment(), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="exists already"):
        Record.create(Experiment(), tmp_path / "empty")
    with pytest.raises(SettingsError, match="exists already"):
        Record.create(Experiment(), tmp_path / "run" / "mine.txt")


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot be written: (Not a directory|File exists)"):
        Record.create(Experiment(), tmp_path / "file" / "run")


def test_rows_are_appended_and_cut_back_to_whole_rounds(tmp_path) -> None:
    record = Record(tmp_path)
    for number in range(5):
        record.append("metrics.csv", [{"round": number, "loss": number / 3, "accuracy": None}])
    whole = record.path("metrics.csv").read_text()
    assert whole.splitlines()[:3] == ["round,loss,accuracy", "0,0.0,", f"1,{1 / 3!r},"]
    with record.path("metrics.csv").open("a") as file:
        file.write("5,0.12")  # a line cut off by a kill
    record.cut(2)
    assert record.path("metrics.csv").read_text() == "".join(whole.splitlines(keepends=True)[:4])
    record.path("metrics.csv").write_text("round,lo")  # killed while it wrote the names of the columns
    record.cut(2)
    assert not record.path("metrics.csv").exists()


def test_an_atomic_write_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_hash_is_the_files_sha256(tmp_path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    assert Record(tmp_path).sha256("model") == sha256(b"weights").hexdigest()
