"""Cables that are pulled and put back: clients try again, and the run goes on with everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import Federation, Run, federated
from helpers.machines import END, Host, eventually

SHORT = 15.0


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    with federated(folder) as made:
        made.start()
        yield made


@pytest.fixture
def run(federation: Federation) -> Iterator[Run]:
    """A run that waits for everybody."""
    started = federation.order({"federation.rounds": 9999, "federation.deadline": 600})
    started.gets_to(1)
    yield started
    if started.status == "running":
        started.stop()


def cut(federation: Federation, host: Host) -> int:
    """Pull a cable while client 3 sends, put it back when something was lost by that; the round."""
    federation.tell(3, {0: "hold"})
    number, sender = federation.holds(3), federation.hosts[3]
    before = sender.sent_again
    host.unplug()
    try:
        federation.release(3)
        federation.leaves(3, number)
        eventually(lambda: sender.sent_again > before, END, "client 3 sends again")
    finally:
        host.plug()
    return number


def test_links_that_were_down_cost_a_run_time_and_no_client(federation: Federation, run: Run) -> None:
    for host in (federation.hosts[3], federation.at):
        number = cut(federation, host)
        run.gets_to(number + 2)
    assert all(run.clients(number) == [1, 2, 3] for number in range(1, run.round))
    assert not any(row["failure"] for row in run.table("ledger.csv"))
    run.counted_once()


def test_a_client_whose_link_stays_down_is_given_up_by_the_deadline_and_rejoins_when_it_is_up(
    federation: Federation,
) -> None:
    settings = {"federation.rounds": 9999, "federation.quorum": 2, "federation.deadline": SHORT}
    run = federation.order(settings)
    run.gets_to(1)
    federation.tell(3, {0: "hold"})
    number = federation.holds(3)
    federation.hosts[3].unplug()
    try:
        federation.release(3)
        run.gets_to(number)
    finally:
        federation.hosts[3].plug()
    assert run.clients(number) == [1, 2]
    assert run.failure(number, 3) == "no answer in time"
    assert run.clients(run.counts(3, after=number)) == [1, 2, 3]
    run.counted_once()
    run.stop()
