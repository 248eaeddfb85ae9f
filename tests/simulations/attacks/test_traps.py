"""What leaks beside a protected update, and what must not."""

from __future__ import annotations

import pytest
import tenseal

from fedveil import Experiment, run
from fedveil.privacy.homomorphic.keys import load_server
from fedveil.server.rounds.captures import read_captures
from fedveil.simulations.attacks.lab.lab import attack
from fedveil.simulations.attacks.lab.observers import observe
from fedveil.simulations.attacks.lab.scoring import words_of
from fedveil.simulations.attacks.lab.trials import Bench

TEXT = Experiment.preset("spam-demo").override({
    "model.name": "mlp", "model.hidden": [16], "training.batch_size": 1, "training.epochs": 1, "data.clients": 60,
    "federation.cohort": 6, "federation.rounds": 1, "federation.capture": True, "data.client_examples": 1,
})  # fmt: skip


@pytest.mark.parametrize("protection", ["ckks", "bfv", "secagg"])
def test_a_protected_update_is_as_long_whatever_words_moved(tmp_path, protection) -> None:
    """Rows that did not move are sent too: their absence would name the words."""
    experiment = TEXT.override({"privacy.protection": protection})
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    (captured,) = read_captures(folder)
    federated = Bench.of(experiment).federated
    words = {client: len(words_of(federated.client(client)[0])) for client in captured.updates}
    assert len(set(words.values())) > 1
    assert len({len(update.sealed) for update in captured.updates.values()}) == 1


@pytest.mark.parametrize("protection", ["ckks", "bfv"])
def test_the_server_s_keys_open_nothing(tmp_path, protection) -> None:
    folder = run(TEXT.override({"privacy.protection": protection}), out=tmp_path / "run", plots=False).run_dir
    assert not (folder / "keys" / "server" / "client.key").exists()
    context = tenseal.context_from(load_server(folder / "keys" / "server" / "server.ctx").context)
    assert not context.is_private()


@pytest.mark.parametrize("protection", ["none", "ckks"])
def test_counts_that_clients_tell_of_their_evaluation_give_their_labels_away_under_encryption_too(protection) -> None:
    experiment = Experiment.preset("spam-demo").override(
        {"privacy.protection": protection, "data.clients": 6, "federation.cohort": 6}
    )
    outcome = attack("counts", experiment, trials=6)
    assert outcome.refused is None
    assert outcome.mean()["accuracy"] > 0.9


def test_clients_that_only_evaluated_are_no_part_of_what_was_trained(tmp_path) -> None:
    settings = {
        "evaluation.federated": True, "data.validation_fraction": 0.2, "evaluation.cohort": 6, "data.clients": 6,
        "federation.cohort": 3, "federation.rounds": 1, "federation.capture": True, "privacy.protection": "secagg",
    }  # fmt: skip
    experiment = Experiment.preset("spam-demo").override(settings)
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    (captured,) = read_captures(folder)
    assert (len(captured.updates), len(captured.trained)) == (6, 3)
    ((seen, clients),) = observe(folder, experiment, "aggregate")
    assert seen.clients == len(clients) == 3


def test_without_evaluation_by_clients_there_are_no_counts(tmp_path) -> None:
    experiment = TEXT.override({"privacy.protection": "none"})
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    assert "heard no counts" in attack("counts", experiment, against=folder).refused
