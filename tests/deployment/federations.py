"""A federation for tests: the server and its clients on machines of their own, and its runs, by what the server keeps of them."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from helpers.machines import END, START, Network, Program, eventually, fedveil, need_root

from fedveil import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.plan import make_lattice
from fedveil.privacy.trust.key_folders import new_parties
from fedveil.remote import Server

PORT, CONTROL = 9092, 9093  # nobody else is in a namespace
ROUNDS = 300.0  # seconds for a few rounds on a machine that has other work
JOINED = "SuperNode ID:"  # what Flower's SuperNode says when a server has let it in
ACTOR = Path(__file__).parent / "actor.py"


def new_keys(folder: Path, clients: int, host: str, protection: str = "none") -> None:
    """Make what `fedveil keys new FOLDER --host HOST --clients N --set privacy.protection=...` makes."""
    privacy = Privacy(protection=protection)  # type: ignore[arg-type]
    lattice = make_lattice(privacy) if privacy.shows == "sum" else None
    write_keys(folder, lattice, clients, new_parties(clients, privacy, [host]))


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

    def __init__(
        self, network: Network, folder: Path, clients: int = 3, protection: str = "none", *, keyed: bool = True
    ) -> None:
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

    def start_server(self, *options: str, wait: bool = True, **environment: str) -> Program:
        """Start the server, again where it had been started before."""
        said = self.server.said.count("control ") if self.server else 0
        trust = ("--keys", self.keys / "server") if self.keyed else ("--insecure",)
        words = fedveil("server", *trust, "--state", self.state, "--port", str(PORT), *options)
        self.server = Program(self.at, words, self.folder, "server", **environment)
        if wait:
            self.server.says("control ", times=said + 1)
        return self.server

    def start_client(
        self, number: int, data: str | Path = "", *options: str | Path, actor: bool = True, **environment: str
    ) -> Program:
        """Start a client, with its share of the digits where no data is named.

        Its owner's policy allows training that repeats from the seed, where no other is named.
        actor: whether it can be told to misbehave (deployment/actor.py)
        """
        if "--policy" not in options:
            policy = self.folder / "repeats.toml"
            policy.write_text('reproducible = "allow"\n')
            options = (*options, "--policy", policy)
        source = data or f"digits:{number}/{len(self.hosts)}"
        trust = ("--keys", self.keys / f"client-{number}") if self.keyed else ("--insecure",)
        words = ("client", "--server", self.address, *trust, "--data", source, "--state", self.client_state(number))
        line = [sys.executable, ACTOR, *words, *options] if actor else fedveil(*words, *options)
        script = self.script(number)
        script.mkdir(exist_ok=True)
        self._joined[number] = self.node_log(number).count(JOINED)
        self.clients[number] = Program(
            self.hosts[number], line, self.folder, f"client-{number}", ACTOR_SCRIPT=str(script),
            **{"XDG_DATA_HOME": str(self.folder / "data-home"), **environment},
        )  # fmt: skip
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
        """The answer of the server's control interface, asked on its own machine."""
        return self.at.call(lambda: Server("localhost").ask(path, body))

    def order(self, settings: Mapping[str, Any], preset: str = "digits", *, reproducible: bool = False) -> Run:
        """Start a run, as `fedveil submit PRESET --on localhost` does on the server's machine."""
        experiment = self.experiment(settings, preset)
        name = self.at.call(
            lambda: Server("localhost").start(experiment, lambda _text: None, reproducible=reproducible)
        )
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
        paths = sorted(
            [*self.folder.glob("*.out"), *self.folder.glob("state*/*.log"), *self.folder.glob("state/logs/*.log")]
        )
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
