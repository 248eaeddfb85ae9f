"""Attacks see what travelled and nothing else, are refused what they lack, and stand beside guessing."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedveil import Experiment, SettingsError, run
from fedveil.simulations.attacks.lab.attack import LACKS, Attack, launch, refusal
from fedveil.simulations.attacks.lab.lab import attack
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.lab.observers import OBSERVERS, observe
from fedveil.simulations.attacks.lab.trials import victims

DIGITS = Experiment.preset("digits").override({"training.optimizer": "sgd", "model.hidden": [16]})
SEEN: list[tuple[Observation, Known]] = []


def remember(observation: Observation, known: Known, _stream: Any) -> np.ndarray:
    """An attack that keeps what it is given, and answers one black image."""
    SEEN.append((observation, known))
    return np.zeros((1, *known.task.shape), np.float32)


REMEMBER = Attack(run=remember, recovers="images", needs=("update", "single client"))


@pytest.fixture
def registered(monkeypatch) -> str:
    SEEN.clear()
    monkeypatch.setitem(sys.modules, "remembering", sys.modules[__name__])
    return "remembering:REMEMBER"


def reachable(root: object) -> list[np.ndarray]:
    """All arrays that can be reached from an object, but through modules, classes and functions' globals."""
    found, waiting, known = [], [root], set()
    while waiting:
        each = waiting.pop()
        if id(each) in known or isinstance(each, type | type(gc) | type(reachable)):
            continue
        known.add(id(each))
        if isinstance(each, np.ndarray):
            found.append(each)
        elif not isinstance(each, nn.Module):
            waiting += gc.get_referents(each)
    return found


def test_no_attack_can_reach_what_it_is_to_recover(registered) -> None:
    outcome = attack(registered, DIGITS, trials=3)
    assert len(SEEN) == len(outcome.scores) == 3
    for (observation, known), shown in zip(SEEN, outcome.shown, strict=True):
        wanted = shown.trial.truth.examples.features
        assert len(wanted) == 1
        arrays = [
            a for a in reachable((observation, known)) if a.shape[1:] == wanted.shape[1:] or a.size == wanted.size
        ]
        assert arrays  # examples alike, at least
        for each in arrays:
            rows = each.reshape(-1, wanted[0].size)
            assert not (rows == wanted.reshape(1, -1)).all(axis=1).any()


def test_what_is_seen_is_what_a_client_sent(registered) -> None:
    attack(registered, DIGITS, trials=1)
    observation, known = SEEN[0]
    assert (observation.kind, observation.clients, observation.examples) == ("delta", 1, 1)
    assert observation.update["dense1.weight"].dtype == np.float64
    assert list(observation.update) == [name for name, _ in known.network.named_parameters()]
    assert observation.training.learning_rate == DIGITS.training.learning_rate


@pytest.mark.parametrize(
    ("protection", "observer", "why"),
    [
        ("ckks", "server", LACKS["update"]),
        ("bfv", "server", LACKS["update"]),
        ("secagg", "server", LACKS["update"]),
        ("none", "wire", LACKS["update"]),
        ("secagg", "aggregate", LACKS["single client"]),
        ("ckks", "key-holder", LACKS["single client"]),
        ("none", "client", LACKS["single client"]),
    ],
)
def test_an_attack_is_refused_what_its_observer_did_not_see_and_scores_as_guessing(
    registered, protection, observer, why
) -> None:
    outcome = attack(registered, DIGITS.override({"privacy.protection": protection}), observer=observer, trials=2)
    assert why in outcome.refused
    assert not SEEN
    assert outcome.scores == outcome.baselines
    assert outcome.summary()["refused"] == outcome.refused


def test_the_key_holder_s_sum_is_the_mean_of_what_all_clients_sent(tmp_path) -> None:
    """Not one client's model, as the book's own cell for secure aggregation has it."""
    chosen = victims(DIGITS, REMEMBER, "key-holder", 1)
    means = {}
    for protection in ("none", "ckks", "bfv", "secagg"):
        experiment = chosen.override({"privacy.protection": protection})
        folder = run(experiment, out=tmp_path / protection, plots=False).run_dir
        ((seen, clients),) = observe(folder, experiment, "key-holder")
        assert len(clients) == seen.clients == 8
        means[protection] = seen.update
        if protection == "none":
            singles = [single.update for single, _ in observe(folder, experiment, "server")]
    for name, value in means["none"].items():
        mean = np.mean([single[name] for single in singles], axis=0)
        assert np.allclose(value, mean, atol=1e-6)
        assert np.abs(value - singles[0][name]).max() > 1e-4
        for protection in ("ckks", "bfv", "secagg"):
            assert np.allclose(means[protection][name], value, atol=1e-4), protection


def test_another_client_takes_its_own_update_out_of_the_mean(tmp_path) -> None:
    experiment = victims(DIGITS, REMEMBER, "client", 1)
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    ((seen, clients),) = observe(folder, experiment, "client")
    others = [single.update for single, (client,) in observe(folder, experiment, "server") if client in clients]
    assert len(others) == seen.clients == 7
    for name, value in seen.update.items():
        assert np.allclose(value, np.mean([other[name] for other in others], axis=0), atol=1e-6)


def test_a_recorded_run_is_attacked_as_it_was(registered, tmp_path) -> None:
    settings = {"federation.capture": True, "federation.rounds": 2, "federation.cohort": 3, "data.clients": 5}
    experiment = DIGITS.override(settings)
    folder = run(experiment, out=tmp_path / "run", plots=False).run_dir
    outcome = attack(registered, experiment, against=folder)
    assert len(outcome.scores) == 6
    assert {observation.round for observation, _ in SEEN} == {1, 2}


def test_bad_requests_are_refused_with_one_message_each(registered, tmp_path) -> None:
    with pytest.raises(SettingsError, match="no observer is called 'sever'; did you mean 'server'"):
        attack(registered, DIGITS, observer="sever")
    with pytest.raises(SettingsError, match="larger than the data of any client"):
        attack(registered, DIGITS.override({"training.batch_size": 999}), asked=frozenset({"training.batch_size"}))
    with pytest.raises(SettingsError, match="makes up no model"):
        attack(registered, DIGITS, observer="malicious-server")


def test_an_attack_says_what_its_observer_lacks() -> None:
    needy = Attack(run=remember, recovers="images", needs=tuple(LACKS))
    nothing = Observation("wire", 1, "ciphertext", before=None, update=None, clients=2)
    known: Any = Known(None, None, None)  # type: ignore[arg-type]
    reason = refusal(needy, nothing, known)
    assert all(words in reason for words in LACKS.values())
    with pytest.raises(SettingsError, match="attack 'needy': the observer 'wire'"):
        launch("needy", needy, nothing, known, None)  # type: ignore[arg-type]


def test_every_observer_says_who_it_is() -> None:
    assert all(observer.knows for observer in OBSERVERS.values())
