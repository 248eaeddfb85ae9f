"""A run that dies at any moment (killed, out of power, out of disk) goes on to the bytes of one that never did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers.kills import command, content, run_killed, stateful

from fedveil import Experiment, SettingsError, resume, run
from fedveil.core.errors import FedveilError
from fedveil.core.record import record as record_module
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import resumable

ENGINES = ("sequential", "batched")  # the disk is written by the process that runs the rounds, whoever trains
STOPS = {"federation.rounds": 6, "federation.patience": 2, "seed": 1}  # after round 4, with a lower learning rate in it
Tree = dict[str, bytes | None]  # a folder's files by path, None for a folder in it


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """Pictures take longer than these little runs."""
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])


@pytest.fixture
def small_checkpoints(monkeypatch) -> None:
    """Tables are flushed every few rounds of these little runs too."""
    monkeypatch.setattr(record_module.Record.__init__, "__defaults__", (700,))


# --- killed: what is on the disk after every call that changes it


def files(folder: Path) -> Tree:
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def lay_out(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, held in tree.items():
        if held is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(held)


CHANGES = {"write", "writelines", "flush", "__exit__", "close", "fsync", "replace", "rename", "link"}
CHANGES |= {"truncate", "unlink", "rmdir", "mkdir", "open"}


@contextmanager
def after_every_change(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` after every C function that may change a file."""

    def watch(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ in CHANGES:
            look()

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def half_written(before: Tree, after: Tree) -> Tree | None:
    """The moment in the middle of an append."""
    for name, now in after.items():
        earlier = before.get(name)
        if now and earlier and len(now) > len(earlier) and now.startswith(earlier):
            return {**after, name: now[: (len(earlier) + len(now)) // 2]}
    return None


def each_different(trees: list[Tree]) -> list[Tree]:
    return list({tuple(sorted(tree.items(), key=lambda item: item[0])): tree for tree in trees}.values())


def assert_all_go_on(trees: list[Tree], experiment: Experiment, whole: Path, tmp_path: Path) -> None:
    wanted = content(whole)
    resumed = 0
    for number, tree in enumerate(trees):
        folder = tmp_path / f"image-{number}"
        lay_out(tree, folder)
        if "experiment.toml" not in tree:
            with pytest.raises(SettingsError, match="not the folder of a run"):
                run(experiment, resume=folder)
            continue
        run(experiment, resume=folder)
        assert content(folder) == wanted, f"image {number}: {[(k, v and len(v)) for k, v in tree.items()]}"
        assert sorted(files(folder)) == sorted(files(whole))  # nothing half-written is left
        resumed += 1
    assert resumed > 20


@pytest.mark.parametrize("engine", [pytest.param("sequential", marks=pytest.mark.long), "batched"])
def test_a_run_goes_on_after_a_kill_between_any_two_changes_of_the_disk(
    engine, tmp_path, no_plots, small_checkpoints
) -> None:
    experiment, whole = stateful(engine, workers=1, **STOPS), tmp_path / "whole"
    trees: list[Tree] = []

    def look() -> None:
        if whole.exists():
            now = files(whole)
            if trees and now != trees[-1]:
                half = half_written(trees[-1], now)
                trees.extend([half] if half else [])
            trees.append(now)

    with after_every_change(look):
        run(experiment, out=whole)
    metrics = (whole / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in metrics[2:]] == ["0.3", "0.3", "0.3", "0.15"]
    assert_all_go_on(each_different(trees), experiment, whole, tmp_path)


# --- out of power: what was never flushed is lost


class ForgetfulDisk:
    """What survives a power cut: contents and names of a folder as they were last flushed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            flush(descriptor)
            path, inode = Path(f"/proc/self/fd/{descriptor}").resolve(), os.fstat(descriptor).st_ino
            if path.is_dir():
                self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                self.contents[inode] = path.read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    def names_lag(self) -> Tree:
        """Nothing reached the disk but what was flushed."""

        def below(inode: int, prefix: str) -> Iterator[tuple[str, bytes | None]]:
            for name, child in self.names.get(inode, {}).items():
                if child in directories:
                    yield prefix + name, None
                    yield from below(child, f"{prefix}{name}/")
                else:
                    yield prefix + name, self.contents.get(child, b"")

        directories = {path.stat().st_ino for path in self.folder.rglob("*") if path.is_dir()}
        return dict(below(self.folder.stat().st_ino, ""))

    def names_lead(self) -> Tree:
        """Every name and length reached the disk, and of contents what was flushed; the rest is zeros."""
        tree: Tree = {}
        for path in sorted(self.folder.rglob("*")):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            kept = self.contents.get(path.stat().st_ino, b"")
            tree[name] = None if path.is_dir() else kept[:size].ljust(size, b"\0")
        return tree


def test_a_run_goes_on_after_a_power_cut_at_any_moment(tmp_path, monkeypatch, no_plots, small_checkpoints) -> None:
    experiment, whole = stateful("batched", workers=1, **STOPS), tmp_path / "whole"
    trees: list[Tree] = []
    with monkeypatch.context() as patch:
        disk = ForgetfulDisk(whole, patch)

        def look() -> None:
            if whole.exists():
                trees.extend([disk.names_lag(), disk.names_lead()])

        with after_every_change(look):
            run(experiment, out=whole)
    finished = files(whole)  # is wholly on the disk
    assert disk.names_lead() == finished
    assert disk.names_lag().items() >= finished.items()
    assert_all_go_on(each_different(trees), experiment, whole, tmp_path)


# --- killed by the system, as it comes


@pytest.mark.parametrize("engine", [pytest.param("batched", marks=pytest.mark.long), "processes"])
def test_a_run_killed_five_times_ends_at_the_same_bytes(engine, tmp_path) -> None:
    experiment = stateful(engine, rounds=60, workers=2)
    summary, kept = run_killed(experiment, tmp_path, kills=5, seed=1)
    whole = run(experiment, out=tmp_path / "whole")
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    for key in ("model_sha256", "bytes_up", "bytes_down", "best_round", "rounds"):
        assert summary[key] == whole.summary[key]
    assert len(set(kept)) >= 4, kept  # the kills came in different rounds


# --- out of disk


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of that size on `folder`; gives a function that changes its size. Skips the test where none can be made."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk (run as root): {made.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def failure(experiment: Experiment, **where: Path) -> FedveilError | None:
    """What a run on a full disk fails with; None where it does not."""
    try:
        run(experiment, **where)
    except FedveilError as error:
        if error.exit_code != 1 or "No space left on device" not in str(error):
            raise
        return error
    return None


def test_a_run_on_a_full_disk_keeps_whole_rounds_and_goes_on_once_there_is_room(tmp_path, no_plots) -> None:
    experiment = stateful("batched", workers=1, rounds=6)
    run(experiment, out=tmp_path / "whole")
    wanted, rounds = content(tmp_path / "whole"), set()
    with small_disk(tmp_path / "disk", 1000) as resize:
        for size in range(4, 200, 8):
            resize(size)
            folder = tmp_path / "disk" / f"run-{size}"
            error = failure(experiment, out=folder)
            if error and folder.exists():
                assert f"go on with: fedveil resume {folder}" in str(error)
                tables = [path.read_text() for path in folder.glob("*.csv")]
                assert all(text.endswith("\n") for text in tables)  # no half-written line
                rounds.add(len((folder / "metrics.csv").read_text().splitlines()) if tables else 0)
                assert failure(experiment, resume=folder)  # as full as before
                resize(1000)
                assert not failure(experiment, resume=folder)
            if folder.exists():
                assert content(folder) == wanted
            resize(1000)
            subprocess.run(["rm", "-rf", folder], check=True)
    assert len(rounds) > 2, rounds  # the disk was full at different stages


def test_a_full_disk_ends_in_one_message_that_says_how_to_go_on(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(stateful("sequential").toml())
    run(stateful("sequential"), out=tmp_path / "whole")
    with small_disk(tmp_path / "disk", 120) as resize:
        folder = tmp_path / "disk" / "run"
        answer = subprocess.run(
            command("run", tmp_path / "mine.toml", "--out", folder, "--json"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 1
        assert answer.stdout == ""
        said = answer.stderr[answer.stderr.index("error") :].splitlines()
        assert said[0].startswith(f"error {folder}/")
        assert said[0].endswith("cannot be written: No space left on device")
        assert said[1].endswith(f"are kept in {folder}")
        assert said[2:] == [f"  make room, and go on with: fedveil resume {folder}"]
        resize(2000)
        answer = subprocess.run(command("resume", folder, "--json"), capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["rounds"] == 3
        assert content(folder) == content(tmp_path / "whole")
        assert (folder / "plots" / "partition.png").exists()


# --- what cannot be resumed is refused, and left as it is


@pytest.fixture
def finished(tmp_path, no_plots) -> Path:
    """The folder of a run that came to its end."""
    run(stateful("sequential"), out=tmp_path / "run")
    return tmp_path / "run"


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def remove_settings(folder: Path) -> None:
    (folder / "experiment.toml").unlink()


def add_a_setting(folder: Path) -> None:
    replace(folder / "experiment.toml", "[training]", "[training]\nwarp = 9")


def edit_a_setting(folder: Path) -> None:
    replace(folder / "experiment.toml", "rounds = 3", "rounds = 4")


def damage_the_checkpoint(folder: Path) -> None:
    path = folder / "checkpoint" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def lose_the_checkpoint(folder: Path) -> None:
    (folder / "checkpoint" / "state.safetensors").unlink()


def lose_rows(folder: Path) -> None:
    path = folder / "clients.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_settings, "is not the folder of a run (it has no experiment.toml)"),
        (add_a_setting, "written by another version of FedVeil, and this one cannot read them"),
        (edit_a_setting, "experiment.toml is not the one that the checkpoint was made with: it was edited, or"),
        (damage_the_checkpoint, "checkpoint/state.safetensors is damaged (its checksum is not the one"),
        (lose_the_checkpoint, "checkpoint/state.safetensors is missing, and rounds were done"),
        (lose_rows, "clients.csv is not as the run left it, rows were edited or lost"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_resumed_is_refused_and_left_alone(damage, said, tmp_path, no_plots, small_checkpoints) -> None:
    folder = tmp_path / "run"
    run(stateful("sequential"), out=folder)
    damage(folder)
    before = files(folder)
    with pytest.raises(SettingsError) as caught:
        run(resumable(folder), resume=folder)
    assert str(caught.value).startswith(f"fedveil resume {folder}: ")
    assert said in str(caught.value)
    assert files(folder) == before


def test_another_experiment_than_the_folders_is_refused(finished) -> None:
    other = stateful("sequential", **{"training.learning_rate": 0.01, "seed": 3})
    with pytest.raises(SettingsError, match=r"holds another experiment \(seed, training.learning_rate\)"):
        run(other, resume=finished)


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_run_on_a_gpu_cannot_go_on_where_there_is_none(finished) -> None:
    replace(finished / "experiment.toml", 'device = "cpu"', 'device = "cuda"')
    with pytest.raises(SettingsError, match=r"this machine cannot compute as that run did \(device = 'cuda'"):
        run(resumable(finished), resume=finished)


def test_a_finished_run_says_so_and_prints_its_summary(finished) -> None:
    before = content(finished)
    answers = [
        subprocess.run(command("resume", finished, *words), capture_output=True, text=True, check=True)
        for words in ((), ("--json",))
    ]
    assert "finished already: no round is left to run" in answers[0].stdout
    assert "3 rounds" in answers[0].stdout
    assert "finished already" in answers[1].stderr
    summary = json.loads(answers[1].stdout)
    assert (summary["rounds"], summary["run_dir"]) == (3, str(finished))
    assert content(finished) == before


# --- another number of rounds


def lengthened(folder: Path, rounds: int) -> FedveilError | None:
    """What `resume` to so many rounds fails with; None where it does not."""
    try:
        resume(folder, rounds=rounds)
    except FedveilError as error:
        return error
    return None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lengthened_run_ends_at_the_bytes_of_one_that_was_as_long_from_the_start(engine, tmp_path, no_plots) -> None:
    run(stateful(engine, workers=1, rounds=5), out=tmp_path / "whole")
    run(stateful(engine, workers=1, rounds=2), out=tmp_path / "run")
    resume(tmp_path / "run", rounds=3)
    resume(tmp_path / "run", rounds=5)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [entry["rounds"] for entry in told["resumes"]] == [[2, 3], [3, 5]]
    assert resumable(tmp_path / "run").federation.rounds == 5


@pytest.mark.parametrize("cut", ["replace_settings", "append"])
def test_a_run_killed_while_it_was_lengthened_goes_on(cut, tmp_path, no_plots, monkeypatch) -> None:
    """Before experiment.toml has the new number, and after it, when the checkpoint still names the old one."""
    run(stateful("sequential", rounds=4), out=tmp_path / "whole")
    run(stateful("sequential", rounds=2), out=tmp_path / "run")

    def killed(*_given: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Record, cut, killed)
        with pytest.raises(SystemExit):
            resume(tmp_path / "run", rounds=4)
    begun = resumable(tmp_path / "run").federation.rounds == 4
    assert begun == (cut == "append")
    resume(tmp_path / "run", rounds=None if begun else 4)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_number_of_rounds_that_cannot_be_is_refused_and_the_run_left_alone(finished) -> None:
    before = files(finished)
    for rounds in (1, 2):
        error = lengthened(finished, rounds)
        assert isinstance(error, SettingsError)
        assert f"fedveil resume {finished} --rounds {rounds}: 3 rounds are done already" in str(error)
    assert files(finished) == before
    assert lengthened(finished, 3) is None  # what it has: its result again


def test_a_schedule_over_all_rounds_is_not_stretched_once_a_round_is_done(tmp_path, no_plots) -> None:
    run(
        stateful("sequential", rounds=2, **{"training.schedule": "cosine", "training.schedule_rounds": None}),
        out=tmp_path / "run",
    )
    before = files(tmp_path / "run")
    error = lengthened(tmp_path / "run", 4)
    assert isinstance(error, SettingsError)
    assert "training.schedule = 'cosine' spread the learning rate over 2 rounds" in str(error)
    assert files(tmp_path / "run") == before


def test_a_run_that_ended_by_itself_is_not_lengthened(tmp_path, no_plots) -> None:
    run(stateful("sequential", rounds=5, **{"federation.target_accuracy": 0.01}), out=tmp_path / "run")
    error = lengthened(tmp_path / "run", 9)
    assert isinstance(error, SettingsError)
    assert "the run ended by itself (target accuracy 0.01 reached in round 1)" in str(error)


def test_settings_edited_by_hand_are_refused_after_a_run_was_lengthened_too(tmp_path, no_plots) -> None:
    run(stateful("sequential", rounds=2), out=tmp_path / "run")
    resume(tmp_path / "run", rounds=3)
    replace(tmp_path / "run" / "experiment.toml", "rounds = 3", "rounds = 4")
    with pytest.raises(SettingsError, match=r"experiment.toml is not the one that the checkpoint was made with"):
        resume(tmp_path / "run")


def test_a_damaged_environment_is_named(finished) -> None:
    (finished / "environment.json").write_text("{")
    with pytest.raises(SettingsError, match=r"environment.json is damaged"):
        resume(finished, rounds=9)
    (finished / "environment.json").unlink()
    resume(finished, rounds=4)
    assert json.loads((finished / "environment.json").read_text())["resumes"][0]["rounds"] == [3, 4]
