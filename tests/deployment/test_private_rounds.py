"""A private run between machines: turns, noise that is taken back, a bound that adapts, a budget; and a server that is killed in it."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import ROUNDS, Federation, federated
from helpers.machines import eventually

from fedveil import Experiment
from fedveil.core.wire.messages import WITHIN
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.key_folders import new_parties

BANDED = {
    "federation.cohort": 2, "federation.rounds": 6, "federation.sampling": "order", "privacy.noise_at": "server",
    "privacy.noise": "banded", "privacy.clip": "adaptive", "privacy.epsilon": 6.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    """Four clients whose keys were made for private runs."""
    with federated(folder, 4) as made:
        shutil.rmtree(made.keys)
        privacy = made.experiment(BANDED).privacy
        write_keys(made.keys, None, 4, new_parties(4, privacy, [made.at.address]))
        made.start()
        yield made


def test_a_private_run_goes_on_after_its_server_was_killed_and_leaves_no_secret_behind(federation: Federation) -> None:
    for client in federation.hosts:
        federation.tell(client, {3: "hold"})
    run = federation.order(BANDED)
    held = [federation.script(client) / "held" for client in federation.hosts]
    eventually(lambda: any(path.exists() for path in held), ROUNDS, "a client holds")
    key = run.folder.with_name(f"{run.name}.noise-key")
    secret = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert federation.server is not None
    federation.server.kill()
    for client in federation.hosts:
        federation.release(client)
    federation.start_server()
    run.ends()
    assert "going on after round 2" in run.log
    turns = [run.clients(number) for number in range(1, 5)]
    assert sorted(turns[0] + turns[1]) == [1, 2, 3, 4]
    assert turns[2:] == turns[:2]
    assert run.round == 4  # round 3 asked its clients twice: a third turn of theirs would pass the budget
    rows = run.table("metrics.csv")
    spent = [float(row["epsilon"]) for row in rows[1:]]
    assert spent == sorted(spent)
    z = Experiment.load(run.folder / "experiment.toml").privacy.multiplier
    assert spent[1] == pytest.approx(gaussian_epsilon(z, 1, 1e-5))
    assert spent[-1] <= 6.0
    assert len({row["clip"] for row in rows}) == len(rows)
    assert {row["seconds"] for row in run.table("ledger.csv") if row["bytes_up"]} == {"0.0"}
    run.counted_once()
    assert not key.exists()
    kept = b"".join(path.read_bytes() for path in federation.state.rglob("*") if path.is_file())
    assert secret not in kept
    assert WITHIN.encode() not in b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
