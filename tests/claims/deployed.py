"""Many clients of a deployed run on one machine: every round whole, and memory that does not grow with the rounds."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.deployed import SERVER, Deployed, run_deployed
from fedveil import Experiment

CLIENTS, ROUNDS = 20, 10
SERVER_MB, CLIENT_MB = 1200.0, 700.0  # at most, of the server's processes and of each client's
GROWTH_MB = 60.0  # at most, from the second round to the last, of either
SETTLED = 2  # rounds after which all that a process loads once is loaded


@dataclass(frozen=True)
class Many:
    """One run of many clients.

    whole: rounds in which each client's update counted once; seconds: of a round, the mean after the first
    server_mb, client_mb: peak of resident memory of the server's processes, and the largest of a client's
    server_growth_mb, client_growth_mb: what of that came after round 2
    """

    clients: int
    rounds: int
    whole: int
    seconds: float
    server_mb: float
    client_mb: float
    server_growth_mb: float
    client_growth_mb: float

    @property
    def holds(self) -> bool:
        """Whether all rounds are whole and memory is within the claim."""
        return (
            self.whole == self.rounds
            and self.server_mb <= SERVER_MB
            and self.client_mb <= CLIENT_MB
            and max(self.server_growth_mb, self.client_growth_mb) <= GROWTH_MB
        )


def measure(clients: int = CLIENTS, rounds: int = ROUNDS, progress: Callable[[str], None] = lambda _: None) -> Many:
    """Train the digits on so many clients, all of them in each round, over TLS and with keys."""
    sizes = {"data.clients": clients, "federation.cohort": clients, "federation.rounds": rounds}
    experiment = Experiment.preset("digits").override({**sizes, "training.epochs": 1})
    with tempfile.TemporaryDirectory() as folder:
        found = judge(run_deployed(experiment, "digits", clients, Path(folder), progress), clients, rounds)
    progress(f"{clients} deployed clients: {found.whole} of {rounds} rounds whole, {found.seconds:.1f} s a round")
    return found


def judge(run: Deployed, clients: int, rounds: int) -> Many:
    """What a run says of the claim."""
    counted = Counter((int(row["round"]), int(row["client"])) for row in run.clients if row["stage"] == "train")
    whole = [
        number for number in range(1, rounds + 1) if all(counted[number, client] == 1 for client in range(clients))
    ]
    settled, last = run.memory(run.ends[SETTLED]), run.memory(run.ends[rounds])
    others = [name for name in last if name != SERVER]
    return Many(
        clients=clients,
        rounds=rounds,
        whole=len(whole),
        seconds=(run.ends[rounds] - run.ends[1]) / (rounds - 1),
        server_mb=last[SERVER],
        client_mb=max(last[name] for name in others),
        server_growth_mb=last[SERVER] - settled[SERVER],
        client_growth_mb=max(last[name] - settled[name] for name in others),
    )


def section(found: Many) -> str:
    """The section of docs/results.md."""
    return f"""
## Many clients on one machine

The digits on {found.clients} deployed clients and a server, all processes of one machine, over TLS and with keys: {found.whole} of {found.rounds} rounds
held every client's update once; {found.seconds:.1f} s a round. Memory is the sum of what was resident at most in each process of a party, shared
pages in each: {found.server_mb:,.0f} MB of the server's (claimed: at most {SERVER_MB:,.0f}), at most {found.client_mb:,.0f} MB of a client's ({CLIENT_MB:,.0f}); of that came after round
{SETTLED}: {found.server_growth_mb:.0f} MB and {found.client_growth_mb:.0f} MB (at most {GROWTH_MB:.0f} each).{"" if found.holds else " (missed)"}
"""
