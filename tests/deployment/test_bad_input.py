"""What people get wrong: one clear message each, on the side that can act on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment.federations import CONTROL, PORT, Federation, Run, federated
from helpers.machines import Program, fedveil

from fedveil.core.wire.messages import REFUSED

OWN = {
    "data.dataset": "own", "data.labels": ["calm", "storm"], "federation.rounds": 2, "federation.quorum": 2,
    "federation.deadline": 15,
}  # fmt: skip


def weather(path: Path, labels: tuple[str, ...], columns: int = 4, seed: int = 0) -> Path:
    """A CSV file of 60 days."""
    rng = np.random.default_rng(seed)
    rows = [",".join(["label", *(f"station{i}" for i in range(columns))])]
    for day in range(60):
        values = rng.normal(day % len(labels), 0.3, columns)
        rows.append(",".join([labels[day % len(labels)], *(f"{value:.3f}" for value in values)]))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    """Clients 1 and 2 and their weather; client 3 brings what a test gives it."""
    with federated(folder) as made:
        for number in (1, 2):
            made.start_client(number, weather(folder / f"{number}.csv", ("calm", "storm"), seed=number), actor=False)
        made.clients[1].says("cannot be reached (Connection refused)")
        made.clients[1].says("trying again")
        server = made.start_server(wait=False)
        server.says("control ")
        made.connected(1, 2)
        yield made


def fails(program: Program, *words: str, code: int) -> None:
    """Check that a program ended with one message that has these words."""
    assert program.ends() == code, program.said
    said = " ".join(program.said.split())
    assert said.startswith("error "), program.said
    for word in words:
        assert word in said, program.said
    assert "Traceback" not in program.said
    assert "PRIVATE KEY" not in program.said


def test_a_client_that_reaches_no_server_says_so_and_joins_when_there_is_one(federation: Federation) -> None:
    said = federation.clients[1].said
    assert said.index("cannot be reached") < said.index("trying again in 1 s") < said.index("joined ")


def test_a_name_that_nobody_has_is_no_such_host(federation: Federation, tmp_path: Path) -> None:
    words = ("--server", "nowhere.invalid:9092", "--insecure", "--data", "digits:3/3")
    program = Program(federation.hosts[3], fedveil("client", *words), tmp_path, "client")
    program.says("no such host")
    program.says("trying again")
    assert program.stop() == 0


@pytest.mark.parametrize("option", ["--port", "--control"])
def test_a_busy_port_is_named_with_its_option(federation: Federation, tmp_path: Path, option: str) -> None:
    ports = {"--port": 9100, "--control": 9101, option: PORT if option == "--port" else CONTROL}
    given = [str(word) for pair in ports.items() for word in pair]
    words = fedveil("server", "--keys", federation.keys / "server", "--state", tmp_path / "state", *given)
    fails(Program(federation.at, words, tmp_path, "server"), f"{option} {ports[option]}: cannot listen", code=1)
    assert not (tmp_path / "state").exists()


def test_a_state_folder_in_use_is_named(federation: Federation, tmp_path: Path) -> None:
    words = ("--keys", federation.keys / "server", "--state", federation.state, "--port", "9100", "--control", "9101")
    fails(
        Program(federation.at, fedveil("server", *words), tmp_path, "server"),
        str(federation.state),
        "another process",
        code=2,
    )


@pytest.mark.parametrize("name", ["identity.key", "ca.pem", "registry.json"])
def test_a_missing_key_file_is_named(federation: Federation, tmp_path: Path, name: str) -> None:
    shutil.copytree(federation.keys / "client-3", tmp_path / "keys")
    (tmp_path / "keys" / name).unlink()
    words = ("--server", federation.address, "--keys", tmp_path / "keys", "--data", "digits:3/3")
    fails(Program(federation.hosts[3], fedveil("client", *words), tmp_path, "client"), name, code=1)


def test_a_key_that_others_can_read_is_refused(federation: Federation, tmp_path: Path) -> None:
    shutil.copytree(federation.keys / "client-3", tmp_path / "keys")
    (tmp_path / "keys" / "identity.key").chmod(0o644)
    words = ("--server", federation.address, "--keys", tmp_path / "keys", "--data", "digits:3/3")
    fails(Program(federation.hosts[3], fedveil("client", *words), tmp_path, "client"), "identity.key", code=1)


def test_a_server_with_a_client_s_key_in_its_folder_does_not_start(federation: Federation, tmp_path: Path) -> None:
    shutil.copytree(federation.keys / "server", tmp_path / "keys")
    shutil.copy(federation.keys / "client-1" / "identity.key", tmp_path / "keys" / "other.txt")
    words = ("--keys", tmp_path / "keys", "--state", tmp_path / "state", "--port", "9100", "--control", "9101")
    fails(Program(federation.at, fedveil("server", *words), tmp_path, "server"), "other.txt", code=1)


def test_data_that_is_not_there_is_named(federation: Federation, tmp_path: Path) -> None:
    words = ("--server", federation.address, "--keys", federation.keys / "client-3", "--data", "no.csv")
    fails(Program(federation.hosts[3], fedveil("client", *words), tmp_path, "client"), "--data no.csv", code=2)


def test_a_run_for_more_clients_than_are_connected_ends_and_says_how_many_are(
    federation: Federation, tmp_path: Path
) -> None:
    settings = {"federation.deadline": 5}
    (tmp_path / "three.toml").write_text(federation.experiment(settings).toml())
    program = Program(
        federation.at, fedveil("submit", tmp_path / "three.toml", "--on", "localhost"), tmp_path, "submit"
    )
    assert program.ends() == 1
    said = " ".join(program.said.split())
    assert "the run needs 3 clients, and " in said
    assert "Traceback" not in said


@pytest.fixture
def third(federation: Federation) -> Iterator[Callable[[Path], None]]:
    """Lets client 3 join with a file of its own; it leaves when the test ends."""

    def join(data: Path) -> None:
        federation.start_client(3, data, actor=False)
        federation.connected(3)

    yield join
    if 3 in federation.clients:
        assert federation.clients.pop(3).stop() == 0


def takes_no_part(federation: Federation, settings: dict[str, Any], words: str) -> Run:
    """A run that goes on without client 3, and says why."""
    run = federation.order(settings)
    run.ends()
    assert f"client-3 takes no part: {words}" in run.log
    rounds = int(run.table("metrics.csv")[-1]["round"])
    assert all(run.clients(number) == [1, 2] for number in range(1, rounds + 1))
    return run


def test_a_client_with_a_class_that_the_run_does_not_name_takes_no_part(
    federation: Federation, third: Callable[[Path], None], tmp_path: Path
) -> None:
    third(weather(tmp_path / "3.csv", ("calm", "storm", "hail")))
    run = takes_no_part(federation, OWN, REFUSED)
    assert "hail" not in run.log  # a value of the data stays with its owner
    assert "hail" in (federation.client_state(3) / "trainer.log").read_text()
    assert run.table("metrics.csv")[2]["test_accuracy"] == ""


def test_a_run_of_clients_whose_tables_differ_ends_before_training_with_both_named(
    federation: Federation, third: Callable[[Path], None], tmp_path: Path
) -> None:
    third(weather(tmp_path / "3.csv", ("calm", "storm"), columns=5))
    run = federation.order(OWN)
    run.ends("failed")
    assert "client-1 (here) and client-3 (there) differ: shape: 4 here, 5 there" in run.error
    assert not (run.folder / "metrics.csv").exists()


def test_a_client_with_images_of_another_size_takes_no_part(
    federation: Federation, third: Callable[[Path], None], tmp_path: Path
) -> None:
    for number, side in ((1, 8), (2, 8), (3, 6)):
        images, labels = np.zeros((20, 1, side, side), np.float32), np.arange(20) % 10
        np.savez(tmp_path / f"{number}.npz", features=images, labels=labels)
    for number in (1, 2):
        assert federation.clients[number].stop() == 0
        federation.start_client(number, tmp_path / f"{number}.npz", actor=False)
    federation.connected(1, 2)
    third(tmp_path / "3.npz")
    settings = {"federation.rounds": 1, "federation.quorum": 2, "federation.deadline": 15}
    takes_no_part(federation, settings, REFUSED)
    assert "holds images of shape 1 x 6 x 6" in (federation.client_state(3) / "trainer.log").read_text()
