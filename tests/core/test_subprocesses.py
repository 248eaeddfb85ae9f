"""Processes that FedVeil starts: what they say is kept, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedveil.core import subprocesses as children
from fedveil.core.errors import DeploymentError
from fedveil.core.subprocesses import Child, check_port, free_port, log_file, wait_for


def soon(holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail after a while."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_child_says_is_in_its_log_with_the_time(tmp_path) -> None:
    child = Child("talker", [sys.executable, "-c", "print('one'); print('two')"], tmp_path / "logs" / "talker.log")
    assert child.ended() == "exit code 0"
    soon(lambda: list(child.tail) == ["one", "two"])
    lines = (tmp_path / "logs" / "talker.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "two"]


def test_logs_rotate(tmp_path) -> None:
    log = log_file("rotating", tmp_path / "a.log", 2000)
    for number in range(1000):
        log.info("line %d", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.log", *(f"a.log.{i}" for i in range(1, children.LOG_FILES))]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2000 * children.LOG_FILES
    assert "line 999" in (tmp_path / "a.log").read_text()


def test_stop_ends_a_stubborn_child_and_what_it_started(tmp_path) -> None:
    line = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); time.sleep(600)"
    )
    child = Child("stubborn", [sys.executable, "-c", line], tmp_path / "stubborn.log")
    soon(lambda: bool(child.tail))
    grandchild = int(child.tail[0])
    child.stop(grace=0.2)
    assert child.ended() == "killed by SIGKILL"
    soon(lambda: not alive(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux feature")
def test_a_child_ends_with_a_parent_that_was_killed(tmp_path) -> None:
    line = (
        "import sys, time; from pathlib import Path; from fedveil.core.subprocesses import Child; "
        f"child = Child('c', [sys.executable, '-c', 'import time; time.sleep(600)'], Path({str(tmp_path / 'c.log')!r})); "
        "print(child.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    soon(lambda: not alive(child))


def test_a_child_that_ends_while_it_is_waited_for_is_quoted(tmp_path) -> None:
    child = Child("failing", [sys.executable, "-c", "raise SystemExit('no such key')"], tmp_path / "failing.log")
    child._reader.join(10)
    with pytest.raises(
        DeploymentError, match=r"the thing did not start \(exit code 1\); its last words:\n  no such key"
    ):
        wait_for(lambda: False, child, 20, "the thing")


def test_a_child_that_takes_too_long_is_named(tmp_path) -> None:
    child = Child("slow", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "slow.log")
    with pytest.raises(DeploymentError, match=r"the thing did not start within 0\.1 s"):
        wait_for(lambda: False, child, 0.1, "the thing")
    child.stop()


def test_a_busy_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeploymentError, match=f"--port {port}: cannot listen on 127.0.0.1:{port}"):
            check_port("127.0.0.1", port, "--port")
    check_port("127.0.0.1", free_port(), "--port")


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux feature")
def test_what_a_child_left_behind_is_ended_too() -> None:
    line = (
        "import subprocess, sys; from fedveil.core.subprocesses import adopt_orphans, end_orphans; adopt_orphans(); "
        'leave = \'import subprocess, sys; print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], '
        "start_new_session=True).pid, flush=True)'; "
        "subprocess.run([sys.executable, '-c', leave]); end_orphans(); print('ended')"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, timeout=60)
    orphan, ended = done.stdout.split()
    assert ended == "ended"
    assert not alive(int(orphan))
