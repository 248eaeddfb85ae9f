"""Clients that die or fall silent, and come back: the round ends with the others, and nobody is counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import Federation, Run, federated
from helpers.machines import END, eventually

DEADLINE = 90.0
SHORT = 15.0


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    with federated(folder) as made:
        made.hosts[3].small_buffers()
        made.start()
        yield made


@pytest.fixture(scope="module")
def run(federation: Federation) -> Iterator[Run]:
    """A run that goes on while one client after another has its accident; each update weighs 0.2 MB."""
    settings = {"model.hidden": [256, 128], "federation.quorum": 2, "federation.deadline": DEADLINE}
    started = federation.order({"federation.rounds": 9999, **settings})
    started.gets_to(1)
    yield started
    if started.status == "running":
        started.stop()


def come_back(federation: Federation, run: Run, number: int) -> None:
    """Start client 3, which was killed in this round, again; check that the others made the round, and that it counts again."""
    federation.start_client(3)
    federation.connected(3)
    again = run.counts(3, after=number)
    assert run.clients(number) == [1, 2]
    assert run.failure(number, 3)
    assert run.clients(again) == [1, 2, 3]
    run.counted_once()


def test_a_client_killed_in_training_is_missed_by_its_round_and_rejoins(federation: Federation, run: Run) -> None:
    federation.tell(3, {0: "hold"})
    number = federation.holds(3)
    federation.clients[3].kill()
    come_back(federation, run, number)


def test_a_client_killed_in_the_middle_of_sending_leaves_nothing_and_rejoins(federation: Federation, run: Run) -> None:
    federation.tell(3, {0: "hold"})
    number = federation.holds(3)
    host = federation.hosts[3]
    host.slow(100)  # the rest would take longer than any death does
    try:
        before = host.sent
        federation.release(3)
        eventually(lambda: host.sent > before + 60_000, END, "client 3 sends its update")
        host.slow(8)  # where other work delays the kill, the rest must not slip out meanwhile
        federation.clients[3].kill()
        assert host.sent < before + 150_000, "it had sent nearly all"
    finally:
        host.slow(None)
    come_back(federation, run, number)


def test_an_update_that_arrived_counts_though_its_client_was_killed_before_the_round_was_over(
    federation: Federation, run: Run
) -> None:
    federation.tell(1, {0: "hold"})
    number = federation.holds(1)
    federation.answered(3, number)
    federation.clients[3].kill()
    federation.release(1)
    run.gets_to(number)
    assert run.clients(number) == [1, 2, 3]
    federation.start_client(3)
    federation.connected(3)
    assert run.clients(run.counts(3, after=number + 1)) == [1, 2, 3]
    run.counted_once()


def test_a_trainer_that_dies_is_replaced_and_its_client_misses_one_round(federation: Federation, run: Run) -> None:
    federation.tell(3, {0: "die"})
    number = federation.holds(3)
    run.gets_to(number + 1)
    assert run.clients(number) == [1, 2]
    assert "trainer died" in run.failure(number, 3)
    assert run.clients(number + 1) == [1, 2, 3]
    federation.clients[3].says("the trainer died (killed by SIGKILL); starting another")
    run.counted_once()


def test_a_quorum_decides_whether_a_run_goes_on_without_clients_that_never_answer(federation: Federation) -> None:
    federation.tell(3, {2: "stand still"})
    federation.tell(2, {3: "stand still"})
    settings = {"federation.rounds": 5, "federation.quorum": 2, "federation.deadline": SHORT}
    run = federation.order(settings)
    run.ends("failed")
    assert run.clients(2) == [1, 2]
    assert run.failure(2, 3) == "no answer in time"
    assert "warning: round 2: client-3: no answer in time" in run.log
    assert [row["failures"] for row in run.table("metrics.csv")] == ["", "0", "1"]
    assert "federation.quorum = 2" in run.error
    assert "kept: the model and metrics of rounds up to 2" in run.error
    assert (run.folder / "checkpoint" / "state.safetensors").exists()


def test_a_client_that_is_stopped_leaves_no_process(federation: Federation) -> None:
    assert federation.clients[1].stop() == 0
    assert federation.hosts[1].commands == {}


def test_a_client_whose_trainer_stands_still_can_be_stopped(federation: Federation) -> None:
    assert federation.clients[2].stop() == 0
    assert federation.hosts[2].commands == {}
