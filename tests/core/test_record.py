"""The record of a run: made once, never half-written, cut back to whole rounds."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
from hashlib import sha256

import pandas as pd
import pytest

from fedveil import Experiment, SettingsError
from fedveil.core.errors import FedveilError
from fedveil.core.record.record import Record, Table, newest, write_atomically, write_in_turn
from fedveil.core.record.resumes import note_resume


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


ROWS = [{"round": number, "loss": number / 3, "stage": "a, b", "accuracy": None} for number in range(5)]


def filled(folder, carried: int) -> tuple[Record, bytes]:
    """A record with some rows, settled after each; and the bytes of its table."""
    record = Record(folder, carried)
    for row in ROWS:
        record.append("metrics.csv", [row])
        record.settle()
    return record, record.path("metrics.csv").read_bytes()


def test_rows_are_written_as_python_writes_numbers(tmp_path, monkeypatch) -> None:
    _, table = filled(tmp_path, 0)
    assert table.decode().splitlines()[:3] == ["round,loss,stage,accuracy", '0,0.0,"a, b",', f'1,{1 / 3!r},"a, b",']


@pytest.mark.parametrize("carried", [0, 40, 10_000])
@pytest.mark.parametrize("after", [b"", b"5,0.12", b"5,0.5,later,\n6,1.5,la", b"\0" * 3000])
def test_a_table_is_cut_back_to_what_the_record_says_of_it(carried, after, tmp_path, monkeypatch) -> None:
    record, table = filled(tmp_path, carried)
    assert (record.tables["metrics.csv"].rows == b"") == (carried == 0)
    for end in (table, table[: record.tables["metrics.csv"].length]):  # rows not flushed are the record's to put back
        record.path("metrics.csv").write_bytes(end + after)
        record.path("clients.csv").write_text("round,cli")  # of a round that does not count
        record.check()
        record.cut()
        assert record.path("metrics.csv").read_bytes() == table
        assert not record.path("clients.csv").exists()
    record.append("metrics.csv", [ROWS[0]])
    assert record.path("metrics.csv").read_bytes() == table + table.splitlines(keepends=True)[1]


@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: t.replace(b"1,", b"7,", 1), lambda t: b""])
def test_a_table_whose_flushed_rows_were_edited_or_lost_is_refused(damage, tmp_path, monkeypatch) -> None:
    record, table = filled(tmp_path, 0)
    record.path("metrics.csv").write_bytes(damage(table))
    with pytest.raises(SettingsError, match=r"metrics.csv is not as the run left it"):
        record.check()
    record.path("metrics.csv").unlink()
    with pytest.raises(SettingsError, match=r"metrics.csv is not as the run left it"):
        record.check()


def test_rows_that_do_not_fit_on_the_disk_leave_no_half_line(tmp_path) -> None:
    record = Record(tmp_path)
    record.append("metrics.csv", ROWS[:1])
    before = record.path("metrics.csv").read_bytes()
    program = (
        "import resource, signal, pathlib; from fedveil.core.record.record import Record, Table\n"
        f"record = Record(pathlib.Path({str(tmp_path)!r})); record.tables['metrics.csv'] = Table({len(before)}, 0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "record.append('metrics.csv', [{'round': 1, 'text': 'x' * 100}] * 1000)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "File too large" in answer.stderr
    assert str(record.path("metrics.csv")) in answer.stderr  # says which
    assert record.path("metrics.csv").read_bytes() == before


def test_a_row_with_more_columns_widens_the_table(tmp_path) -> None:
    record = Record(tmp_path)
    for row in (
        {"round": 0, "text": 'a "b", c\nd'},
        {"round": 1, "text": "e", "own": 2.5},
        {"round": 2, "text": "f", "new": 1},
    ):
        record.append("metrics.csv", [row])
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["round"].tolist() == [0, 1, 2]
    assert table.text.tolist() == ['a "b", c\ufffdd', "e", "f"]  # a line break of another party's is none here
    assert table.own.fillna(0).tolist() == [0, 2.5, 0]
    assert table.new.fillna(0).tolist() == [0, 0, 1]
    record.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_killed_between_a_wider_table_and_its_checkpoint_goes_on_from_the_narrow_one(tmp_path) -> None:
    record = Record(tmp_path, carried=1)
    record.append("metrics.csv", [{"round": 0, "text": "a"}])
    record.settle()
    kept = dataclasses.replace(record.tables["metrics.csv"])
    assert kept.length > 0
    narrow = record.path("metrics.csv").read_bytes()
    record.append("metrics.csv", [{"round": 1, "text": "b", "own": 2.5}])
    again = Record(tmp_path)
    again.tables["metrics.csv"] = kept
    again.check()
    again.cut()
    assert again.path("metrics.csv").read_bytes() == narrow
    again.append("metrics.csv", [{"round": 1, "text": "b", "own": 2.5}])
    assert pd.read_csv(tmp_path / "metrics.csv").own.tolist()[1] == 2.5
    again.path("metrics.csv").write_text("edited\n")
    again.tables["metrics.csv"] = Table(100, 1)
    with pytest.raises(SettingsError, match="rows were edited or lost"):
        again.check()


def test_a_file_written_in_turn_is_always_whole_and_keeps_the_one_before(tmp_path, monkeypatch) -> None:
    path = tmp_path / "state"
    for content in (b"one", b"two, longer", b"3"):
        write_in_turn(path, content)
        assert newest(path).read_bytes() == content
    assert (tmp_path / "previous-state").read_bytes() == b"two, longer"
    path.unlink()  # killed between the two renames
    assert newest(path).read_bytes() == b"two, longer"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            write_in_turn(path, b"four")
    assert caught.value.filename == str(path)
    assert newest(path).read_bytes() == b"two, longer"
    write_in_turn(path, b"four")
    assert (path.read_bytes(), (tmp_path / "previous-state").read_bytes()) == (b"four", b"two, longer")
    assert sorted(os.listdir(tmp_path)) == ["previous-state", "state"]


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_that_finds_no_room_leaves_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FedveilError, match=r"--out .*run: cannot be written: No space left") as caught:
        Record.create(Experiment(), tmp_path / "run")
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_cannot_flush_a_folder_will_do(tmp_path, monkeypatch) -> None:
    flush = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_an_atomic_write_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # what was half-written takes no room


def test_the_hash_is_the_files_sha256(tmp_path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    assert Record(tmp_path).sha256("model") == sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            "flwr-serverapp --insecure --token T0P --parent-pid 7",
            "flwr-serverapp --insecure --token *** --parent-pid 7",
        ),
        ("x --token=T0P --api-key T0P --auth-secret=T0P", "x --token=*** --api-key *** --auth-secret=***"),
        ("fedveil run --set tracker.password=T0P", "fedveil run --set tracker.password=***"),
        ("x https://me:T0P@host/p http://T0P@h", "x https://***@host/p http://***@h"),
        ("x --token --token T0P", "x --token *** ***"),
        ("fedveil server --keys DIR --secret-file F --set data.max_tokens=5", ""),
        ("fedveil run digits --set federation.rounds=3", ""),
    ],
)
def test_no_secret_of_a_command_is_written_to_a_record(given, kept, tmp_path) -> None:
    record = Record.create(Experiment(), tmp_path / "run", given.split())
    command = json.loads(record.path("environment.json").read_bytes())["command"]
    assert command == (kept or given).split()
    note_resume(record, Experiment(), 0, given.split())
    assert "T0P" not in record.path("environment.json").read_text()


def test_a_private_file_is_never_readable_by_others(tmp_path, monkeypatch) -> None:
    path, written, fsync = tmp_path / "secret", [], os.fsync
    (tmp_path / ".secret.part").touch(mode=0o644)  # of a process that was killed

    def note(descriptor: int) -> None:
        written.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "fsync", note)
        write_atomically(path, b"secret", private=True)
        write_atomically(tmp_path / "public", b"public")
    finally:
        os.umask(before)
    assert [mode for mode in written if mode < 0o700] == [0o600, 0o666]
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (0o600, b"secret")
