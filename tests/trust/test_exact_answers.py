"""A server that asks a noisy client for numbers that travel without noise: the loss of a model that it crafts, an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trust.federation import first_model
from trust.liar import DeployedClient, Refused, refused_for

from fedveil.client.node.trainer import ClientProfile
from fedveil.core.settings.experiment import Experiment

SETTINGS = Experiment.preset("digits").override({
    "data.clients": 3, "federation.cohort": 3, "federation.rounds": 1, "model.hidden": [8], "data.validation_fraction": 0.2,
})  # fmt: skip
NOISE = {"privacy.clip": 1.0, "privacy.noise_multiplier": 1.0}
ROUND = {"server-round": 1, "learning-rate": 0.1}


def client(tmp_path: Any, experiment: Experiment, policy: str = "") -> DeployedClient:
    (tmp_path / "policy.toml").write_text(policy)
    profile = ClientProfile(0, "digits:1/3", "", str(tmp_path / "policy.toml"), str(tmp_path / "one.ledger"))
    return DeployedClient(profile, {"experiment": experiment.toml()})


@pytest.mark.parametrize("policy", ["", "min_noise = 1.0\nmax_epochs = 5\nmax_rounds = 1\n", "max_epsilon = 20.0\n"])
def test_a_noisy_client_tells_neither_the_loss_of_a_model_nor_an_evaluation(tmp_path, policy) -> None:
    noisy = SETTINGS.override(NOISE)
    here, given = client(tmp_path, noisy, policy), first_model(noisy)
    crafted = {name: np.zeros_like(value) for name, value in given.items()}
    with refused_for("asks for a loss, which travels without noise"):
        here.ask("train", crafted, {**ROUND, "report-global-loss": True})
    with refused_for("asks for an evaluation after round 1, and evaluation.federated = false"):
        here.ask("evaluate", crafted, {"server-round": 1})
    told = dict(here.ask("train", given, ROUND)["metrics"])
    assert set(told) == {"client", "num-examples", "seconds"}  # nothing else of the data is in a noisy reply
    assert told["num-examples"] == 1
    assert told["seconds"] == 0  # they tell how many examples there are


def test_a_run_without_federated_evaluation_is_not_evaluated(tmp_path) -> None:
    here = client(tmp_path, SETTINGS)
    with refused_for("evaluation.federated = false"):
        here.ask("evaluate", first_model(SETTINGS), {"server-round": 1})


def test_an_owner_may_refuse_to_evaluate_and_to_answer_without_noise(tmp_path) -> None:
    evaluated = SETTINGS.override({"evaluation.federated": True})
    with pytest.raises(Refused, match="this client's policy refuses"):
        client(tmp_path, evaluated, "evaluates = false\n").ask("query")
    with pytest.raises(Refused, match="this client's policy refuses"):
        client(tmp_path, SETTINGS, "max_epsilon = 5.0\n").ask("query")
    at_server = SETTINGS.override({**NOISE, "privacy.noise_at": "server"})  # which the client cannot see
    with pytest.raises(Refused, match="this client's policy refuses"):
        client(tmp_path, at_server, "max_epsilon = 5.0\n").ask("query")


def test_a_crafted_model_evaluated_again_and_again_is_answered_once_a_round(tmp_path) -> None:
    evaluated = SETTINGS.override({"evaluation.federated": True})
    here, given = client(tmp_path, evaluated), first_model(evaluated)
    first = dict(here.ask("evaluate", given, {"server-round": 1})["metrics"])
    assert dict(here.ask("evaluate", given, {"server-round": 1})["metrics"]) == first
    with pytest.raises(Refused, match="this client refuses"):
        here.ask("evaluate", {name: value * 2 for name, value in given.items()}, {"server-round": 1})
