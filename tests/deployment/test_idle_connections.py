"""A stranger holds a thousand slow and silent connections from one address: rounds go on in at most twice their time."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from deployment.federations import PORT, Federation, Run, federated
from helpers.machines import Program

CONNECTIONS, ROUNDS = 1000, 15
USUAL = 1024  # files that most systems let a process open that asks for no more
STRANGER = Path(__file__).parent / "stranger.py"


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with federated(folder) as made:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL, soft), hard))
        made.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield made


def moments(run: Run) -> dict[int, float]:
    """When each round was over, in seconds since the epoch."""
    found = {}
    for line in run.log.splitlines():
        day, clock, *words = line.split(maxsplit=4)
        if words[:1] == ["round"]:
            moment = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S,%f")
            found[int(words[1].partition("/")[0])] = moment.timestamp()
    return found


def seconds(run: Run, first: int, last: int) -> float:
    """The median of these rounds' seconds."""
    ends = moments(run)
    return statistics.median(
        later - earlier for earlier, later in pairwise(ends[n] for n in range(first - 1, last + 1))
    )


def test_rounds_take_at_most_twice_their_time_while_a_stranger_holds_a_thousand_connections(
    federation: Federation,
) -> None:
    host = federation.network.host("stranger")
    run = federation.order({"federation.rounds": 9999})
    run.says(f"round {ROUNDS + 1}/")
    before = seconds(run, 2, ROUNDS + 1)
    words = [sys.executable, STRANGER, federation.at.address, str(PORT), str(CONNECTIONS)]
    stranger = Program(host, words, federation.folder, "stranger")
    stranger.says("opened")
    begin = run.round + 1
    run.says(f"round {begin + ROUNDS}/")
    during = seconds(run, begin + 1, begin + ROUNDS)
    assert stranger.process.poll() is None, stranger.said
    stranger.kill()
    run.stop()
    run.counted_once()
    print(f"seconds a round: {before:.2f} before, {during:.2f} while {CONNECTIONS} connections are held")
    assert during <= 2 * before
    assert all(run.clients(number) == [1, 2, 3] for number in range(begin, begin + ROUNDS)), "no client is locked out"
    assert "too many are open" in (federation.state / "logs" / "gateway.log").read_text()
