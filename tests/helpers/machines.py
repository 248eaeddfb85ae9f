"""Machines for tests: network namespaces with one cable each to a switch, and real programs on them.

Nothing here waits for luck: what is to happen is looked for until it has, or its deadline is over.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

START = 300.0  # seconds for a program to get going on a machine that has other work
END = 60.0  # seconds for a program to end
_CLONE_NEWNET = 0x40000000
_NETWORKS = itertools.count()
T = TypeVar("T")


def need_root() -> None:
    """Skip, and say so, where no network namespaces can be made."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("NOT TESTED: needs Linux, root and `ip` (iproute2) to make hosts of network namespaces")
    probe = f"fv{os.getpid()}-{threading.get_native_id()}"  # two walks may look at once
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"NOT TESTED: this system does not let root make network namespaces: {made.stderr.strip()}")
    _ip("netns", "del", probe)


def eventually(holds: Callable[[], T], seconds: float, what: str | Callable[[], str]) -> T:
    """The first true answer of `holds()`; fail, saying `what` did not happen, where none comes in time."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
    return answer


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Host:
    """A machine: a network namespace, its address, and a cable to the switch."""

    def __init__(self, switch: str, space: str, number: int) -> None:
        self.space, self.address = space, f"10.77.0.{number}"
        self._switch, self._socket = switch, f"port{number}"
        _ip("netns", "add", space)
        _ip("-n", switch, "link", "add", self._socket, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", switch, "link", "set", self._socket, "master", "switch", "up")
        _ip("-n", space, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """A command line that runs on this machine, under the process id that it is started with."""
        return ["ip", "netns", "exec", self.space, *map(str, words)]

    def call(self, function: Callable[[], T]) -> T:
        """What `function()` returns or raises; the sockets that it opens are this machine's."""
        outcome: list[tuple[T | None, BaseException | None]] = []

        def inside() -> None:
            try:
                with open(f"/run/netns/{self.space}") as space:
                    if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"cannot enter {self.space}")
                outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=inside)  # its network ends with it
        thread.start()
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def unplug(self) -> None:
        """Take the cable out, at the switch."""
        _ip("-n", self._switch, "link", "set", self._socket, "down")

    def plug(self) -> None:
        """Put the cable in again."""
        _ip("-n", self._switch, "link", "set", self._socket, "up")

    def small_buffers(self) -> None:
        """Let its connections from here on hold little of what they send: a program that dies leaves it unsent."""
        self.call(lambda: Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 8192 8192"))

    def slow(self, kilobits: int | None) -> None:
        """Send no more than so much a second; None for as fast as it can."""
        limit = ["tbf", "rate", f"{kilobits}kbit", "burst", "16kb", "latency", "200ms"]
        change = ["del", "dev", "eth0", "root"] if kilobits is None else ["replace", "dev", "eth0", "root", *limit]
        subprocess.run(["tc", "-n", self.space, "qdisc", *change], check=True, capture_output=True)

    @property
    def sent(self) -> int:
        """Bytes that left by its cable."""
        return int(json.loads(_ip("-n", self.space, "-s", "-j", "link", "show", "eth0"))[0]["stats64"]["tx"]["bytes"])

    def add_address(self, address: str) -> None:
        """Let it be reached by another address too."""
        _ip("-n", self.space, "address", "add", f"{address}/24", "dev", "eth0")

    @property
    def listening(self) -> set[tuple[str, int]]:
        """The addresses and TCP ports that its programs listen on, of IPv4 as in 127.0.0.1, of IPv6 in hexadecimal."""
        found = set()
        for line in self.call(self._sockets).splitlines():
            words = line.split()
            if words[3] == "0A":
                address, port = words[1].split(":")
                four = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address
                found.add((four, int(port, 16)))
        return found

    @staticmethod
    def _sockets() -> str:
        tables = (Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6"))
        return "\n".join(table.split("\n", 1)[1].strip("\n") for table in tables).strip("\n")

    @property
    def sent_again(self) -> int:
        """TCP segments that it sent once more, as nobody confirmed them."""
        names, values = (line.split() for line in self.call(self._counters).splitlines() if line.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])

    @staticmethod
    def _counters() -> str:
        return Path("/proc/thread-self/net/snmp").read_text()

    @property
    def processes(self) -> list[int]:
        """Ids of all processes on this machine."""
        return [int(line) for line in _ip("netns", "pids", self.space).split()]

    def kill(self, process: int) -> None:
        """End one of its processes by SIGKILL."""
        assert process in self.processes
        os.kill(process, signal.SIGKILL)

    def idle(self, seconds: float = END) -> None:
        """Wait until no process is left."""
        eventually(lambda: not self.processes, seconds, lambda: f"{self.space} is idle; it runs {self.commands}")

    @property
    def commands(self) -> dict[int, str]:
        """The command lines of its processes."""
        found = {}
        for process in self.processes:
            with suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes()
                found[process] = words.replace(b"\0", b" ").decode(errors="replace")
        return found

    def remove(self) -> list[str]:
        """Kill what still runs here and take the machine away; return the command lines of what had been left."""
        left = self.commands
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _ip("netns", "del", self.space)
        return [f"{self.space}: {process} {words}" for process, words in left.items()]


class Network:
    """A switch, and the machines on it."""

    def __init__(self) -> None:
        self._name = f"fv{os.getpid()}-{next(_NETWORKS)}"
        self._switch = f"{self._name}-switch"
        self.hosts: list[Host] = []
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")

    def host(self, name: str) -> Host:
        """A new machine."""
        self.hosts.append(Host(self._switch, f"{self._name}-{name}", len(self.hosts) + 1))
        return self.hosts[-1]

    def remove(self) -> list[str]:
        """Take all of it away; return the processes that had been left. Fail where a namespace stays."""
        left = [words for host in self.hosts for words in host.remove()]
        _ip("netns", "del", self._switch)
        spaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
        assert not [space for space in spaces if space.startswith(f"{self._name}-")], spaces
        return left


class Program:
    """A program on a machine, and what it said."""

    def __init__(self, host: Host, words: Sequence[str | Path], folder: Path, name: str, **environment: str) -> None:
        self.host, self.name, self.output = host, name, folder / f"{name}.out"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                host.command(words),
                cwd=folder,
                env={**os.environ, "FEDVEIL_DATA": str(folder / "no-data"), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All it wrote."""
        return self.output.read_text("utf-8", errors="replace")

    def says(self, words: str, seconds: float = START, times: int = 1) -> None:
        """Wait until it said these words so many times; fail where it ends before."""

        def heard() -> bool:
            if self.said.count(words) >= times:
                return True
            if self.process.poll() is not None:
                assert self.said.count(words) >= times, f"{self.name} ended without {words!r}:\n{self.said}"
            return False

        eventually(heard, seconds, lambda: f"{self.name} says {words!r}; it said:\n{self.said}")

    def ends(self, seconds: float = START) -> int:
        """Wait until it ends by itself; its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} did not end within {seconds:g} s; it said:\n{self.said}")

    def stop(self) -> int:
        """Ask it to end, and wait; its exit code."""
        self.process.terminate()
        return self.ends(END)

    def kill(self) -> None:
        """End it by SIGKILL, which it cannot notice, and wait until what it had started has ended too."""
        self.process.kill()
        self.process.wait()
        self.host.idle()


def fedveil(*words: str | Path) -> list[str | Path]:
    """The command line of `fedveil`, in this Python."""
    return [sys.executable, "-m", "fedveil", *words]
