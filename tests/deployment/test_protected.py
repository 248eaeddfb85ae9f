"""Protected runs between machines: no aggregate of fewer than three, whoever is silent; and no ciphertext but this round's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment.federations import Federation, federated

from fedveil.simulations.holder import open_record

DEADLINE = 15.0
# What client 4 does to its ciphertext, and what the record says of it.
REFUSED = {
    "another key": "key",
    "another run": "run",
    "another round": "round",
    "another's": "client",
    "replayed": "round",
    "truncated": "cut",
    "in the clear": "not protected with ckks",
}


@pytest.fixture(scope="module")
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Four clients whose keys were made for one protection."""
    with federated(tmp_path_factory.mktemp(request.param), 4, request.param) as made:
        made.start()
        yield made


def protection(federation: Federation) -> str:
    return federation.folder.name.rstrip("0123456789")


@pytest.mark.parametrize("federation", ["ckks"], indirect=True)
def test_a_ciphertext_that_is_not_this_round_s_is_refused_and_its_client_named(
    federation: Federation, tmp_path: Path
) -> None:
    federation.tell(4, dict(enumerate(REFUSED, start=2)))
    run = federation.order({"federation.rounds": len(REFUSED) + 2, "federation.deadline": 60})
    run.ends()
    for number, (deed, words) in enumerate(REFUSED.items(), start=2):
        assert run.clients(number) == [1, 2, 3], deed
        assert words in run.failure(number, 4), deed
        assert f"client-4: {run.failure(number, 4)}" in run.log
    assert run.clients(len(REFUSED) + 2) == [1, 2, 3, 4]
    assert not (run.folder / "model.safetensors").exists()
    assert open_record(run.folder, federation.keys / "client-1", tmp_path / "model.safetensors").exists()
    run.counted_once()


@pytest.mark.parametrize("federation", ["ckks", "secagg"], indirect=True)
def test_a_round_goes_on_without_one_of_four_and_never_with_two(federation: Federation) -> None:
    ciphertexts = protection(federation) == "ckks"  # each stage of the other waits for whoever is silent
    silent = {4: 2, 3: 3} if ciphertexts else {4: 2, 3: 2}
    for client, number in silent.items():
        federation.tell(client, {number: "stand still"})
    run = federation.order({"federation.rounds": 4, "federation.deadline": DEADLINE})
    run.ends("failed")
    assert run.clients(1) == [1, 2, 3, 4]
    if ciphertexts:
        assert run.clients(2) == [1, 2, 3]
        assert run.failure(2, 4) == "no answer in time"
    assert run.round == silent[3] - 1
    assert f"round {silent[3]}" in run.error
    assert ("privacy.protection.min_clients = 3" if ciphertexts else "from 2 of 4 clients, and it takes 3") in run.error
    assert f"kept: the model and metrics of rounds up to {run.round}" in run.error
    assert {row["round"] for row in run.table("clients.csv")} == {str(number) for number in range(1, run.round + 1)}
    run.counted_once()
