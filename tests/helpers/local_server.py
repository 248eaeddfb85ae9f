"""A real server on loopback, what its processes listen on, and what another user of its machine can do about it."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fedveil.core.settings.sections import Privacy
from fedveil.core.subprocesses import free_port
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import new_parties

NOBODY = 65534
START, END = 120.0, 30.0  # seconds
T = TypeVar("T")


class LocalServer:
    """A server that was started with keys for `clients` clients without protection, in a folder.

    files: the most files and connections that the system lets it open
    """

    def __init__(self, folder: Path, clients: int = 3, files: int | None = None) -> None:
        self.folder, self.state, self.keys = folder, folder / "state", folder / "keys"
        self.port, self.control = free_port(), free_port()
        self.said = folder / "server.out"
        write_keys(self.keys, None, clients, new_parties(clients, Privacy(), ["localhost"]))
        self._files = files
        self.process = self.start("server", "--keys", self.keys / "server", "--state", self.state, "--host", "127.0.0.1",
                                  "--port", str(self.port), "--control", str(self.control))  # fmt: skip
        self.waits(lambda: "state " in self.said.read_text(), "the server starts")

    def start(self, name: str, *words: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start `fedveil NAME WORDS`."""
        with (self.folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "fedveil", name.partition("-")[0], *map(str, words)],
                cwd=self.folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=self._limit,
            )  # fmt: skip

    def _limit(self) -> None:
        if self._files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._files, self._files))

    def waits(self, holds: Callable[[], T], what: str, seconds: float = START) -> T:
        """The first true answer of `holds()`."""
        deadline = time.monotonic() + seconds
        while not (answer := holds()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"not within {seconds:g} s: {what}\n{self.said.read_text()}")
            time.sleep(0.05)
        return answer

    @property
    def processes(self) -> list[int]:
        """Its process, and all that it started."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for process in found:
            found += [child for child, parent in parents.items() if parent == process]
        return found

    @property
    def ports(self) -> set[int]:
        """The TCP ports that its processes listen on."""
        held = self._sockets()
        rows = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in held}

    @property
    def paths(self) -> set[str]:
        """The Unix sockets that its processes listen on; of one in no folder, a name that begins with @."""
        held, listens = self._sockets(), 0x10000
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        return {row[7] for row in rows if len(row) > 7 and int(row[3], 16) & listens and row[6] in held}

    def _sockets(self) -> set[str]:
        found = set()
        for process in self.processes:
            with suppress(OSError):
                for path in Path(f"/proc/{process}/fd").iterdir():
                    with suppress(OSError):
                        found.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
        return found

    def stop(self) -> None:
        """End it, in order."""
        self.process.terminate()
        try:
            self.process.wait(END)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"the server did not end within {END:g} s")


@contextmanager
def local_server(folder: Path, files: int | None = None) -> Iterator[LocalServer]:
    """A server that is stopped afterwards."""
    made = LocalServer(folder, files=files)
    try:
        yield made
    finally:
        made.stop()


def as_another_user(function: Callable[[], T]) -> T:
    """What `function()`, whose answer JSON can hold, returns in a process of another user of this machine."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: needs root, to be another user")
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told: Any = [function()]
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        with os.fdopen(theirs, "w") as file:
            json.dump(told, file)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        told = json.load(file)
    os.waitpid(child, 0)
    assert isinstance(told, list), told
    return told[0]  # type: ignore[no-any-return]


def call(
    where: int | str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    tls: bool,
    method: str = "POST",
) -> tuple[int, str]:
    """The status and text of an answer of a port, or of the Unix socket at a path; 0 and the reason where none comes."""
    line: http.client.HTTPConnection
    if tls:
        loose = ssl.create_default_context()
        loose.check_hostname, loose.verify_mode = False, ssl.CERT_NONE
        line = http.client.HTTPSConnection("127.0.0.1", int(where), timeout=20, context=loose)
    else:
        line = http.client.HTTPConnection("127.0.0.1", where if isinstance(where, int) else 80, timeout=20)
    try:
        if isinstance(where, str):
            line.sock = socket.socket(socket.AF_UNIX)
            line.sock.connect(f"\0{where[1:]}" if where.startswith("@") else where)
        with closing(line):
            line.request(method, path, body, headers or {})
            answer = line.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{type(error).__name__}: {error}"
