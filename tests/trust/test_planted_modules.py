"""A stranger who can write into the folder in which FedVeil is started: no Python of FedVeil's imports what lies there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path

import pytest
from helpers.gates import SECONDS, gate, superlink

from fedveil.client.node.trainer import ClientProfile, command
from fedveil.core.subprocesses import Child, free_port, wait_for
from fedveil.server.flower import TASK_TOKEN
from fedveil.server.serving.superlink import start_process

# modules that every start imports, some of the standard library, some not, and one that is installed nowhere
PLANTED = ("json", "logging", "random", "httpx", "numpy", "torch", "fedveil", "flwr", "tensorboard", "planted_nowhere")


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, full of planted modules, each of which leaves a mark when it is imported."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'marks')!r}, 'a').write({name!r} + '\\n')\nraise ImportError('planted')\n"
        )
    monkeypatch.chdir(folder)
    return tmp_path / "marks"


@pytest.fixture(params=["", "working folder", "empty entry"])
def python_path(request: pytest.FixtureRequest, marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH as it may be: not set, with the folder, or with an empty entry, which is the working folder."""
    if request.param:
        monkeypatch.setenv("PYTHONPATH", os.getcwd() if request.param == "working folder" else f":{marks.parent}")


@pytest.mark.usefixtures("python_path")
def test_the_trainer_imports_nothing_planted(tmp_path: Path, marks: Path) -> None:
    ours, theirs = Pipe()
    with theirs:
        line = command(theirs.fileno(), ClientProfile(1, "digits:2/3"))
        child = Child("trainer", line, tmp_path / "trainer.log", pass_fds=(theirs.fileno(),))
    wait_for(lambda: ours.poll(0) and ours.recv() == "ready", child, SECONDS, "the trainer")
    ours.close()
    assert child.process.wait(30) == 0
    assert not marks.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("python_path")
def test_flowers_processes_import_nothing_planted(tmp_path: Path, marks: Path) -> None:
    with superlink(tmp_path) as link, gate(link) as (address, _):
        node = Child(
            "flower-supernode",
            [
                *("flower-supernode", "--insecure", "--superlink", address, "--isolation", "process"),
                *("--host", "127.0.0.1", "--port", str(free_port())),
            ],
            tmp_path / "supernode.log",
            {"FLWR_HOME": str(tmp_path / "flower")},
        )
        app = start_process(link, "app", {TASK_TOKEN: "of no task"}, tmp_path / "app.log")
        try:
            wait_for(lambda: any("SuperNode ID" in line for line in node.tail), node, SECONDS, "the SuperNode")
            app.ended()
        finally:
            node.stop()
    assert "401" in "".join(app.tail) or "Invalid" in "".join(app.tail), "it has imported all it needs, and was refused"
    assert not marks.exists()


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": ""}])
def test_what_a_child_starts_imports_nothing_planted(
    tmp_path: Path, marks: Path, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import json, planted_nowhere'])"
    child = Child("parent", [sys.executable, "-c", start], tmp_path / "parent.log", environment)
    assert child.ended() == "exit code 0"
    assert not marks.exists()


@pytest.mark.parametrize("words", [("client", "--help"), ("server", "--help"), ("keys", "--help")])
def test_commands_that_work_with_keys_do_not_look_into_the_working_folder(marks: Path, words: tuple[str, ...]) -> None:
    start = (
        "import sys; from fedveil.cli import main; sys.argv = ['fedveil', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import json; print(json.dumps(sys.path))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", start, *words], capture_output=True, text=True, check=True)
    assert os.getcwd() not in json.loads(done.stdout.splitlines()[-1])
    assert not marks.exists()


def test_a_users_own_part_is_found_in_the_working_folder_and_hides_nothing_installed(marks: Path) -> None:
    Path("my_rules.py").write_text("def keep(*_given): ...\n")
    start = "import sys; from fedveil.cli import main; sys.argv = ['fedveil', *sys.argv[1:]]; main()"
    words = ("show", "partitions", "my_rules:keep")
    done = subprocess.run([sys.executable, "-P", "-c", start, *words], capture_output=True, text=True, check=False)
    assert "my_rules:keep" in done.stdout, done.stderr
    assert not marks.exists()
