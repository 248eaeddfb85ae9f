"""Machines for tests: network namespaces with one cable each to a switch, and a federation of real processes on them.

Nothing here waits for luck: what is to happen is looked for until it has, or its deadline is over.
"""

from __future__ import annotations

import csv
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fedveil import Experiment
from fedveil.core.experiment import LATTICES, Privacy
from fedveil.privacy.keys import write_keys
from fedveil.privacy.parties import new_parties
from fedveil.privacy.plan import make_lattice
from fedveil.remote import Server

PORT, CONTROL = 9092, 9093  # nobody else is in a namespace
START = 120.0  # seconds for a program to get going on a machine that has other work
END = 30.0  # seconds for a program to end
ROUNDS = 120.0  # seconds for a few rounds
JOINED = "SuperNode ID:"  # what Flower's SuperNode says when a server has let it in
ACTOR = Path(__file__).parent / "deployment" / "actor.py"
_CLONE_NEWNET = 0x40000000
_NETWORKS = itertools.count()
T = TypeVar("T")


def need_root() -> None:
    """Skip, and say so, where no network namespaces can be made."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("NOT TESTED: needs Linux, root and `ip` (iproute2) to make hosts of network namespaces")
    probe = f"fv{os.getpid()}-probe"
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

    def slow(self, kilobits: int | None) -> None:
        """Send no more than so much a second; None for as fast as it can."""
        limit = ["tbf", "rate", f"{kilobits}kbit", "burst", "16kb", "latency", "200ms"]
        change = ["del", "dev", "eth0", "root"] if kilobits is None else ["add", "dev", "eth0", "root", *limit]
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


def new_keys(folder: Path, clients: int, host: str, protection: str = "none") -> None:
    """Make what `fedveil keys new FOLDER --host HOST --clients N --set privacy.protection=...` makes."""
    privacy = Privacy(protection=protection)  # type: ignore[arg-type]
    lattice = make_lattice(privacy) if protection in LATTICES else None
    write_keys(folder, lattice, clients, new_parties(clients, privacy, [host]))


def fedveil(*words: str | Path) -> list[str | Path]:
    """The command line of `fedveil`, in this Python."""
    return [sys.executable, "-m", "fedveil", *words]


class Run:
    """A run on a federation's server, by what the server keeps of it."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.federation, self.name = federation, name
        self.folder = federation.state / "runs" / name

    @property
    def log(self) -> str:
        """What it said."""
        path = self.federation.state / "logs" / f"{self.name}.log"
        return path.read_text("utf-8") if path.exists() else ""

    @property
    def status(self) -> str:
        """What its order says: running, done, failed, stopped."""
        return str(self._order["status"])

    @property
    def error(self) -> str:
        """Why it is not done."""
        return str((self._order["result"] or {}).get("error", ""))

    @property
    def _order(self) -> dict[str, Any]:
        return dict(json.loads((self.federation.state / "orders" / f"{self.name}.json").read_text("utf-8")))

    def says(self, words: str, seconds: float = ROUNDS) -> None:
        """Wait until its log has these words; fail where it ends before."""

        def heard() -> bool:
            ended = self.status != "running"
            if words in self.log:
                return True
            assert not ended, f"{self.name} is {self.status} without {words!r}:\n{self.error}\n{self.log}"
            return False

        eventually(heard, seconds, lambda: f"{self.name} says {words!r}; it said:\n{self.log}")

    def over(self, seconds: float = ROUNDS) -> None:
        """Wait until it ends, however it does."""
        eventually(lambda: self.status != "running", seconds, lambda: f"{self.name} ends; it said:\n{self.log}")

    def ends(self, status: str = "done", seconds: float = ROUNDS) -> None:
        """Wait until it ends; fail where it ends otherwise."""
        self.over(seconds)
        assert self.status == status, f"{self.name} is {self.status}: {self.error}\n{self.log}"

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of one of its tables."""
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def clients(self, number: int, stage: str = "train") -> list[int]:
        """Clients, from 1, whose replies count in a round."""
        rows = self.table("clients.csv")
        return [int(row["client"]) + 1 for row in rows if (row["round"], row["stage"]) == (str(number), stage)]

    def failure(self, number: int, client: int, stage: str = "train") -> str:
        """Why a client's reply in a round does not count; empty where it does."""
        found = [
            row["failure"]
            for row in self.table("ledger.csv")
            if (row["round"], row["stage"], row["client"]) == (str(number), stage, str(client - 1))
        ]
        assert len(found) == 1, f"{len(found)} rows of client {client} in round {number}"
        return found[0]

    @property
    def round(self) -> int:
        """The newest whole round; 0 where there is none yet."""
        rows = self.table("metrics.csv") if (self.folder / "metrics.csv").exists() else []
        return int(rows[-1]["round"]) if rows else 0

    def gets_to(self, number: int, seconds: float = ROUNDS) -> None:
        """Wait until a round is whole."""

        def whole() -> bool:
            assert self.status == "running" or self.round >= number, f"{self.name} is {self.status}: {self.error}"
            return self.round >= number

        eventually(whole, seconds, lambda: f"{self.name} ends round {number}; it said:\n{self.log}")

    def counts(self, client: int, after: int, seconds: float = ROUNDS) -> int:
        """Wait until a client counts in a round after this one; the round."""

        def found() -> int:
            assert self.status == "running", f"{self.name} is {self.status}: {self.error}"
            return next((number for number in range(after + 1, self.round + 1) if client in self.clients(number)), 0)

        return eventually(found, seconds, lambda: f"client {client} counts after round {after}:\n{self.log}")

    def stop(self) -> None:
        """Ask it to stop, and wait until it has."""
        self.federation.ask(f"/runs/{self.name}/stop", {})
        self.ends("stopped")

    def counted_once(self) -> None:
        """Check that each client is in a round at most once, and each round in metrics.csv once, in order."""
        seen = [(row["round"], row["stage"], row["client"]) for row in self.table("clients.csv")]
        assert len(set(seen)) == len(seen), seen
        rounds = [int(row["round"]) for row in self.table("metrics.csv")]
        assert rounds == list(range(rounds[-1] + 1))


class Federation:
    """A server and clients on machines of their own, with the keys that `fedveil keys new` makes."""

    def __init__(self, network: Network, folder: Path, clients: int = 3, protection: str = "none", *, keyed: bool = True) -> None:
        """keyed: with TLS and keys for a protection, else --insecure"""
        self.network, self.folder, self.keyed = network, folder, keyed
        self.state, self.keys = folder / "state", folder / "keys"
        self.at = network.host("server")
        self.hosts = {number: network.host(f"client-{number}") for number in range(1, clients + 1)}
        self.address = f"{self.at.address}:{PORT}"
        self.server: Program | None = None
        self.clients: dict[int, Program] = {}
        self.runs: list[Run] = []
        self._joined: dict[int, int] = {}
        if keyed:
            new_keys(self.keys, clients, self.at.address, protection)

    def start_server(self, *options: str, wait: bool = True) -> Program:
        """Start the server, again where it had been started before."""
        said = self.server.said.count("control ") if self.server else 0
        trust = ("--keys", self.keys / "server") if self.keyed else ("--insecure",)
        words = fedveil("server", *trust, "--state", self.state, "--port", str(PORT), *options)
        self.server = Program(self.at, words, self.folder, "server")
        if wait:
            self.server.says("control ", times=said + 1)
        return self.server

    def start_client(
        self, number: int, data: str | Path = "", *options: str | Path, actor: bool = True, **environment: str
    ) -> Program:
        """Start a client, with its share of the digits where no data is named.

        actor: whether it can be told to misbehave (deployment/actor.py)
        """
        source = data or f"digits:{number}/{len(self.hosts)}"
        trust = ("--keys", self.keys / f"client-{number}") if self.keyed else ("--insecure",)
        words = ("client", "--server", self.address, *trust, "--data", source, "--state", self.client_state(number))
        line = [sys.executable, ACTOR, *words, *options] if actor else fedveil(*words, *options)
        script = self.script(number)
        script.mkdir(exist_ok=True)
        self._joined[number] = self.node_log(number).count(JOINED)
        self.clients[number] = Program(
            self.hosts[number], line, self.folder, f"client-{number}", ACTOR_SCRIPT=str(script), **environment
        )
        return self.clients[number]

    def client_state(self, number: int) -> Path:
        """The folder of a client's logs."""
        return self.folder / f"state-{number}"

    def node_log(self, number: int) -> str:
        """What a client's SuperNode said."""
        path = self.client_state(number) / "supernode.log"
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    def script(self, number: int) -> Path:
        """The folder of what a client is told to do."""
        return self.folder / f"script-{number}"

    def start(self, *options: str) -> None:
        """Start the server and all clients, and wait until they are connected."""
        server = self.start_server(*options, wait=False)
        for number in self.hosts:
            self.start_client(number)
        server.says("control ")
        self.connected(*self.hosts)

    def connected(self, *numbers: int, seconds: float = START) -> None:
        """Wait until these clients' nodes are connected."""

        def there() -> bool:
            for number in numbers:
                program = self.clients[number]
                assert program.process.poll() is None, f"client {number} ended:\n{program.said}"
                if self.node_log(number).count(JOINED) == self._joined[number]:
                    return False
            found = {one["client"] + 1 for one in self.ask("/status")["clients"] if one["connected"]}
            return found >= set(numbers)

        eventually(there, seconds, lambda: f"clients {numbers} are connected: {self.ask('/status')['clients']}")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer of the server's desk, asked on its own machine."""
        return self.at.call(lambda: Server("localhost").ask(path, body))

    def order(self, settings: Mapping[str, Any], preset: str = "digits") -> Run:
        """Start a run, as `fedveil run PRESET --on localhost` does on the server's machine."""
        experiment = self.experiment(settings, preset)
        name = self.at.call(lambda: Server("localhost").start(experiment, lambda _text: None))
        self.runs.append(Run(self, name))
        return self.runs[-1]

    def experiment(self, settings: Mapping[str, Any], preset: str = "digits") -> Experiment:
        """The preset for as many clients as there are, all of them in each round."""
        clients = len(self.hosts)
        sizes = {"data.clients": clients, "federation.cohort": clients, "training.epochs": 1, "model.hidden": [16]}
        return Experiment.preset(preset).override({**sizes, **settings})

    def tell(self, number: int, deeds: Mapping[int, str]) -> None:
        """Let a client do something else than it should in some rounds, or, as round 0, in the next that it is asked for.

        What it was told before is forgotten.
        """
        script = self.script(number)
        shutil.rmtree(script, ignore_errors=True)
        script.mkdir()
        for when, deed in deeds.items():
            (script / "new").write_text(deed)
            (script / "new").rename(script / f"round-{when}")

    def holds(self, number: int, seconds: float = ROUNDS) -> int:
        """Wait until a client that was told to hold, or to stand still, does; the round."""
        path = self.script(number) / "held"
        eventually(path.exists, seconds, f"client {number} holds")
        return int(path.read_text())

    def leaves(self, number: int, when: int, seconds: float = ROUNDS) -> None:
        """Wait until a client's node begins to send its answer in a round."""
        path = self.script(number) / "answered"

        def sends() -> bool:
            log = self.node_log(number).rpartition(JOINED)[2]
            return path.exists() and int(path.read_text()) >= when and log.count("Receiving:") == log.count("Sending:")

        eventually(sends, seconds, f"client {number} sends its answer in round {when}")

    def answered(self, number: int, when: int, seconds: float = ROUNDS) -> None:
        """Wait until a client's answer in a round has left it."""
        self.leaves(number, when, seconds)

        def sent() -> bool:
            log = self.node_log(number).rpartition(JOINED)[2]
            return log.count("Sending:") == log.count("Sent succ")

        eventually(sent, seconds, f"client {number} sent its answer in round {when}")

    def release(self, number: int) -> None:
        """Let a client that holds go on."""
        (self.script(number) / "go").touch()

    def logs(self, lines: int = 25) -> str:
        """The end of each log and output, for who looks why a test failed."""
        paths = sorted([*self.folder.glob("*.out"), *self.folder.glob("state*/*.log"), *self.folder.glob("state/logs/*.log")])
        parts = []
        for path in paths:
            words = path.read_text("utf-8", errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.relative_to(self.folder)}", *words]))
        return "\n".join(parts)

    def stop(self) -> None:
        """End all in order: clients, then the server."""
        programs = [*self.clients.values(), *([self.server] if self.server else [])]
        for program in programs:
            with suppress(ProcessLookupError):
                for number in (signal.SIGCONT, signal.SIGTERM):
                    program.process.send_signal(number)
        late = []
        for program in programs:
            try:
                program.process.wait(END)
            except subprocess.TimeoutExpired:
                program.process.kill()
                program.process.wait()
                late.append(program.name)
        assert not late, f"did not end within {END:g} s of SIGTERM: {late}"


LIVE: list[Federation] = []  # whose logs a failure shows


@contextmanager
def federated(folder: Path, clients: int = 3, protection: str = "none", *, keyed: bool = True) -> Iterator[Federation]:
    """A federation that is not started; at the end it is stopped in order, and nothing of it may be left."""
    need_root()
    network = Network()
    try:
        federation = Federation(network, folder, clients, protection, keyed=keyed)
        LIVE.append(federation)
        yield federation
        federation.stop()
    except BaseException:
        network.remove()
        raise
    else:
        left = network.remove()
        assert not left, "processes were left:\n" + "\n".join(left)
    finally:
        LIVE.clear()
