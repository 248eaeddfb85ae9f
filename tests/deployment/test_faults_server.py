"""A server that is killed and started again on its state goes on with its runs, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import Federation, Run, federated
from helpers.machines import END

import fedveil

ROUNDS = {"federation.rounds": 4, "seed": 11}
SAME = ("model.safetensors", "metrics.csv", "clients.csv")


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    with federated(folder) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def uninterrupted(federation: Federation) -> Run:
    run = federation.order(ROUNDS, reproducible=True)
    run.ends()
    return run


def assert_same(one: Path, other: Path) -> None:
    different = [name for name in SAME if (one / name).read_bytes() != (other / name).read_bytes()]
    assert not different, f"{different} differ in {one} and {other}"


def test_a_deployed_run_makes_the_bytes_of_the_same_run_in_one_process(
    federation: Federation, uninterrupted: Run, tmp_path: Path
) -> None:
    experiment = federation.experiment({**ROUNDS, "engine": "sequential"})
    fedveil.run(experiment, out=tmp_path / "run")
    assert_same(uninterrupted.folder, tmp_path / "run")


def test_a_server_killed_in_a_round_goes_on_with_it_and_ends_with_the_uninterrupted_bytes(
    federation: Federation, uninterrupted: Run
) -> None:
    federation.tell(3, {3: "hold"})
    run = federation.order(ROUNDS, reproducible=True)
    assert federation.holds(3) == 3
    assert federation.server is not None
    federation.server.kill()
    federation.release(3)
    federation.start_server()
    run.ends()
    assert "going on after round 2" in run.log
    assert_same(run.folder, uninterrupted.folder)
    run.counted_once()


def test_a_server_stopped_in_order_leaves_no_process_and_goes_on_when_it_is_started_again(
    federation: Federation, uninterrupted: Run
) -> None:
    federation.tell(3, {3: "hold"})
    run = federation.order(ROUNDS, reproducible=True)
    assert federation.holds(3) == 3
    assert federation.server is not None
    assert federation.server.stop() == 0
    assert federation.at.commands == {}
    federation.start_server()
    federation.release(3)
    run.ends()
    assert_same(run.folder, uninterrupted.folder)
    run.counted_once()


def test_a_server_whose_superlink_dies_ends_with_its_words(federation: Federation) -> None:
    assert federation.server is not None
    (link,) = [process for process, words in federation.at.commands.items() if "run_superlink()" in words]
    federation.at.kill(link)
    assert federation.server.ends(END) == 1
    assert "Flower's SuperLink ended (killed by SIGKILL)" in federation.server.said
    assert "Traceback" not in federation.server.said
    federation.at.idle()
