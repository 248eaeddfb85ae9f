"""Mistakes in ordering a run: each is said at once, with its cause, and none waits for clients who cannot come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import Federation, federated

from fedveil.core.errors import SettingsError
from fedveil.server.serving.client_roster import ASSEMBLY

OWN = {"data.dataset": "own", "data.labels": ["ham", "spam"], "federation.rounds": 2}
AT_ONCE = 0.8 * ASSEMBLY  # seconds; who waited for clients waited longer


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    """Three clients with numbers of their own, which train one epoch and no more; a server that takes 100 KB of each."""
    (folder / "policy.toml").write_text("max_epochs = 1\n")
    with federated(folder) as made:
        server = made.start_server("--max-update", "0.1", wait=False)
        for number in made.hosts:
            rows = [f"{label},{number + i % 7},{i % 5}" for i, label in enumerate(["ham", "spam"] * 20)]
            path = folder / f"mine-{number}.csv"
            path.write_text("\n".join(["label,a,b", *rows]) + "\n")
            made.start_client(number, path, "--policy", folder / "policy.toml")
        server.says("control ")
        made.connected(*made.hosts)
        yield made


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"data.clients": 5, "federation.cohort": 5}, "this federation has 3 registered clients"),
        ({"data.labels": None}, "data.labels: must name the classes"),
    ],
)
def test_what_no_client_could_take_part_in_is_refused_when_it_is_typed(federation: Federation, settings, why) -> None:
    with pytest.raises(SettingsError, match=why):
        federation.order(OWN | settings)


def test_a_run_that_all_clients_refuse_ends_with_their_reasons_and_not_by_waiting(federation: Federation) -> None:
    run = federation.order(OWN | {"training.epochs": 3})
    run.ends("failed", AT_ONCE)
    for number in federation.hosts:
        assert f"client-{number}: this client's policy refuses training.epochs" in run.error
    assert "start more clients" not in run.error
    federation.clients[1].says("refused: this client's policy refuses the run")


def test_an_update_larger_than_the_server_takes_is_refused_before_anybody_trains(federation: Federation) -> None:
    run = federation.order(OWN | {"model.hidden": [300, 300]})
    run.ends("failed", AT_ONCE)
    assert "fedveil server --max-update = 0.1 refuses it" in run.error
    assert run.round == 0


def test_a_run_without_any_score_says_so_at_its_start_and_draws_none(federation: Federation) -> None:
    run = federation.order(OWN)
    run.ends()
    first, later = run.log.index("nobody evaluates this run"), run.log.index("round 1/2")
    assert first < later
    assert "--set evaluation.federated=true" in run.log
    assert [path.name for path in (run.folder / "plots").iterdir()] == ["loss.png"]
    logs = federation.state / "logs"
    assert "No artists" not in "".join(path.read_text("utf-8") for path in logs.glob("*.log"))
    federation.clients[2].says("round 2  trained on 40 examples")


def test_the_record_holds_no_token_and_the_status_the_rounds(federation: Federation) -> None:
    run = federation.runs[-1]
    kept = (run.folder / "environment.json").read_text()
    assert "--token" not in json.loads(kept)["command"]
    assert (federation.state / "control.token").read_text().strip() not in kept
    told = {one["run"]: one for one in federation.ask("/status")["runs"]}[run.name]
    assert (told["round"], told["rounds"], list(told["scores"])) == (2, 2, ["train_loss"])
