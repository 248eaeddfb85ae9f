"""Commands of `fedveil` in processes of their own, forked from one that has imported everything: each starts in milliseconds.

A command of `python -m fedveil` takes two seconds of imports, and tests start some hundred. The process that they are forked
from computes nothing and reads no settings, so that each command is as if started anew: with its own folder, environment,
output and exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

IMPORTED = (
    "matplotlib.pyplot", "pandas", "rich.table", "sklearn.datasets", "tenseal", "torch", "fedveil.cli", "fedveil.machines",
    "fedveil.remote", "fedveil.simulations.apps", "fedveil.simulations.display", "fedveil.simulations.plots", "fedveil.simulations.run",
    "fedveil.training",
)  # fmt: skip
_processes: dict[int, subprocess.Popen[str]] = {}  # by the process of the tests, as each worker has its own


def fedveil(
    *words: object, cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m fedveil WORDS` in a folder, and return how it ended.

    environment: of the command, this process' without it
    Raise subprocess.TimeoutExpired where it takes longer than `timeout` seconds; it is killed then.
    """
    command = list(map(str, words))
    given = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        order = {
            "words": command,
            "cwd": str(cwd),
            "environment": given,
            "out": str(out),
            "error": str(error),
            "timeout": timeout,
        }
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code = json.loads(process.stdout.readline())
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code, out.read_text("utf-8"), error.read_text("utf-8"))


def _process() -> subprocess.Popen[str]:
    """Return the process that commands are forked from; it ends with this one, whose end closes its input."""
    found = _processes.get(os.getpid())
    if found is None or found.poll() is not None:
        found = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        _processes[os.getpid()] = found
        atexit.register(found.terminate)
    return found


def _serve() -> None:
    """Fork a child for each order on standard input, and answer with its exit code, or null where it took too long."""
    import importlib

    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    before = dict(os.environ)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            _run(order, before)
        answers.write(json.dumps(_wait(child, order["timeout"])) + "\n")
        answers.flush()


def _wait(child: int, timeout: float) -> int | None:
    """Return a child's exit code, negative for a signal; None where it had to be killed after `timeout` seconds."""
    import signal
    import time

    deadline, pause = time.monotonic() + timeout, 0.002
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(order: Mapping[str, Any], before: Mapping[str, str]) -> None:
    """Become the command: its folder, environment, output and words; never return."""
    code = 1
    try:
        os.chdir(order["cwd"])
        for name in before.keys() - order["environment"].keys():
            del os.environ[name]
        os.environ.update(order["environment"])
        for path, descriptor in (("/dev/null", 0), (order["out"], 1), (order["error"], 2)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.path[:0] = ["", *filter(None, order["environment"].get("PYTHONPATH", "").split(os.pathsep))]
        sys.argv = ["fedveil", *order["words"]]
        sys.stdin = os.fdopen(0)
        from fedveil.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
