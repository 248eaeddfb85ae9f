"""Child processes: their output goes to rotating log files, and they end when their parent ends.

They hold keys and data, so that Python in them, and in what they start, imports what is installed and nothing else:
no file of the working folder, and none that PYTHONPATH names.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from logging import Formatter, Logger, LogRecord, getLogger
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fedveil.core.errors import DeploymentError
from fedveil.core.foreign import legible

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LOG_BYTES, LOG_FILES = 5_000_000, 5  # bytes of one log file, number of files kept
OPEN_FILES = 65_536
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
ALWAYS = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1",
}  # fmt: skip
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # that Flower's words are written in
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of Linux's prctl


def log_file(name: str, path: Path, size: int = LOG_BYTES) -> Logger:
    """Return a logger that writes lines with their time to `path`, and rotates the file at `size` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=size, backupCount=LOG_FILES - 1, encoding="utf-8")
    handler.setFormatter(_Legible("%(asctime)s %(message)s"))
    log = getLogger(f"fedveil.{name}.{path}")
    log.propagate = False
    log.setLevel("INFO")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    return log


class _Legible(Formatter):
    """Lines of a log, in which what another party said can neither move a cursor nor begin a line of its own."""

    def format(self, record: LogRecord) -> str:
        return legible(super().format(record)).replace("\n", "\n  ")


class Child:
    """A child process; on Linux it gets SIGTERM when this process ends, also where this one is killed.

    tail: the last lines that it wrote
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        unsaid: Sequence[str] = (),
    ) -> None:
        """Start the process. Call this from the main thread: the child is told when the thread that started it ends.

        command: the program and its arguments; log: the file that its output goes to
        environment: variables to add to this process' own, without its PYTHONPATH
        pass_fds: file descriptors to leave open
        unsaid: output lines that hold one of these words are dropped
        """
        self.name = name
        self.tail: deque[str] = deque(maxlen=40)
        self._log, self._unsaid = log_file(name, log), tuple(unsaid)
        inherited = {variable: value for variable, value in os.environ.items() if variable != "PYTHONPATH"}
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**inherited, **ALWAYS, "PATH": _path(), **(environment or {})},
            pass_fds=pass_fds,
            start_new_session=True,  # so that Ctrl-C reaches the parent alone, which ends children in order
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = legible(_COLOUR.sub("", line.decode("utf-8", "replace").rstrip()))
            if any(words in text for words in self._unsaid):
                continue
            self.tail.append(text)
            self._log.handle(LogRecord(self.name, 20, "", 0, text, None, None))

    @property
    def running(self) -> bool:
        """Whether the process is still running."""
        return self.process.poll() is None

    def ended(self) -> str:
        """Wait for the process to end, and say in words how it ended."""
        code = self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self, grace: float = GRACE) -> None:
        """Send SIGTERM, wait up to `grace` seconds, then kill the process and all that it started."""
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        # the child leads a process group; one that is gone already is no error
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=2)


def _path() -> str:
    """Return a PATH that starts beside this Python, where Flower's commands are even if no environment is activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def allow_open_files(number: int = OPEN_FILES) -> None:
    """Let this process, and those it starts, open so many files and connections, or as many as the system lets them."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def adopt_orphans() -> None:
    """Make this process the parent of orphans that its children leave behind; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1)


def end_orphans(seconds: float = GRACE) -> None:
    """Kill all remaining children, adopted orphans included, and wait until they are gone.

    Call it after `adopt_orphans`, when no child is needed any more.
    seconds: the longest wait
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (left := _children()):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)


def _children() -> list[int]:
    """Return the ids of this process' children; an empty list where the system has no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_DEATH_SIGNAL, signal.SIGTERM)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that is free at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def check_port(host: str, port: int, option: str) -> None:
    """Raise DeploymentError, naming the option, where the port cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise DeploymentError(
                f"{option} {port}: cannot listen on {host}:{port} ({error.strerror}); stop what uses it, or name another port"
            ) from None


def wait_for(ready: Callable[[], bool], child: Child, seconds: float, what: str) -> None:
    """Wait until `ready()` is true; raise DeploymentError where the child ends before, or `seconds` pass.

    what: the name of the child in errors
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if not child.running:
            words = "\n  ".join(list(child.tail)[-8:])
            raise DeploymentError(f"{what} did not start ({child.ended()}); its last words:\n  {words}")
        if time.monotonic() > deadline:
            raise DeploymentError(f"{what} did not start within {seconds:g} s")
        time.sleep(0.05)
