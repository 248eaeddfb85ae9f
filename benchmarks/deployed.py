"""One deployed run, started as users start it, with all parties on this machine, and measured from outside.

Clients reach the server through a meter of bytes; all speak TLS, each party with its own keys.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks import ROOT, party
from benchmarks.memory import Watch
from benchmarks.party import Note
from benchmarks.traffic import Meter
from fedveil.core.errors import FedveilError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.core.subprocesses import GRACE, Child, free_port, wait_for
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import new_parties
from fedveil.remote import Server

STARTING = 180.0  # seconds that a party may take to start where others use the machine
SERVER = "server"
Ledger = list[dict[str, str]]


@dataclass(frozen=True)
class Deployed:
    """The measurements of one run; moments are seconds since the epoch.

    ends: when each round was done, recorded and checkpointed
    notes: of the server and of all clients, see `party`
    ledger: rows of ledger.csv; clients: rows of clients.csv
    wire: bytes up, bytes down and new connections between two moments
    memory: peaks of the server's processes, and of each client's, in MB, until a moment
    """

    ends: dict[int, float]
    notes: list[Note]
    ledger: Ledger
    clients: Ledger
    wire: Callable[[float, float], tuple[int, int, int]]
    memory: Callable[[float], Mapping[str, float]]

    def payload(self, rounds: set[int]) -> tuple[int, int]:
        """Return bytes up and bytes down in these rounds by the run's ledger."""
        rows = [row for row in self.ledger if int(row["round"]) in rounds]
        return sum(int(row["bytes_up"] or 0) for row in rows), sum(int(row["bytes_down"]) for row in rows)


def run_deployed(
    experiment: Experiment,
    data: str,
    clients: int,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Deployed:
    """Run an experiment on a server and `clients` clients, of which client k holds partition k of `data`.

    experiment: has `federation.cohort` = `data.clients` = clients; folder: empty, for the files of all parties
    Raises FedveilError, with the last lines of a party's log, where one does not start or the run fails.
    """
    write_keys(folder / "keys", None, clients, new_parties(clients, Privacy(), ["localhost"]))
    port, control = free_port(), free_port()
    with ExitStack() as stack:
        words: list[str | Path] = ["--keys", folder / "keys" / "server", "--state", folder / "state"]
        words += ["--host", "127.0.0.1", "--port", str(port), "--control", str(control)]
        server = stack.enter_context(_party(folder, SERVER, "server", *words))
        wait_for(lambda: any(line.startswith("control") for line in server.tail), server, STARTING, "the server")
        meter = stack.enter_context(Meter(port))
        remote = Server(f"127.0.0.1:{control}")
        joined: list[Child] = []
        for client in range(clients):
            name = f"client-{client + 1}"
            words = ["--keys", folder / "keys" / name, "--state", folder / name]
            words += ["--server", f"localhost:{meter.port}", "--data", f"{data}:{client + 1}/{clients}"]
            joined.append(stack.enter_context(_party(folder, name, "client", str(client), *words)))
            # many clients started at once would be so slow that they give up
            if len(joined) % (os.cpu_count() or 1) == 0 or len(joined) == clients:
                _wait_for_clients(remote, joined)
                progress(f"{len(joined)} of {clients} clients are connected")
        roots = {child.name: child.process.pid for child in (server, *joined)}
        memory = stack.enter_context(Watch(roots))
        run = remote.start(experiment, lambda _line: None)
        remote.follow(run, lambda _line: None)
    state = folder / "state"
    notes = [note for name in roots for note in party.read(folder / f"{name}.notes")]
    return Deployed(
        round_ends(state / "logs" / f"{run}.log"),
        sorted(notes, key=lambda note: note.when),
        _table(state / "runs" / run / "ledger.csv"),
        _table(state / "runs" / run / "clients.csv"),
        meter.between,
        memory.peaks_mb,
    )


def round_ends(log: Path) -> dict[int, float]:
    """Read from a run's log when each round was done, in seconds since the epoch."""
    ends = {}
    for line in log.read_text("utf-8").splitlines():
        day, clock, *words = line.split(maxsplit=4)
        if words[:1] == ["round"]:
            number = int(words[1].partition("/")[0])
            ends[number] = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return ends


@contextmanager
def _party(folder: Path, name: str, *words: str | Path) -> Iterator[Child]:
    """Start a party's process for the block; end it afterwards, with all that it started."""
    notes = folder / f"{name}.notes"
    notes.touch()
    command = [sys.executable, "-P", "-m", "benchmarks.party", str(notes), *map(str, words)]
    with started(name, command, folder, {"FLWR_HOME": str(folder / "flower"), "PYTHONPATH": str(ROOT)}) as child:
        yield child


@contextmanager
def started(name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Child]:
    """Start a process for the block; end it afterwards, with all of its group."""
    child = Child(name, command, folder / f"{name}.log", environment)
    try:
        yield child
    finally:
        child.stop(2 * GRACE)  # it ends its own children first


def _wait_for_clients(remote: Server, clients: Sequence[Child]) -> None:
    """Wait until all are connected; raise FedveilError, with the last lines of one that is not, after a time."""
    deadline = time.monotonic() + STARTING
    while True:
        told = remote.ask("/status")["clients"]
        connected = {f"client-{one['client'] + 1}" for one in told if one["connected"]}
        missing = [child for child in clients if child.name not in connected]
        if not missing:
            return
        ended = [child for child in missing if not child.running]
        if ended or time.monotonic() > deadline:
            child = (ended or missing)[0]
            how = "ended" if ended else f"did not join within {STARTING:.0f} s"
            words = "\n  ".join(list(child.tail)[-4:])
            raise FedveilError(f"benchmark: {child.name} {how}; its last words:\n  {words}")
        time.sleep(0.2)


def _table(path: Path) -> Ledger:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise FedveilError(f"benchmark: the deployed run left no {path.name}") from None
