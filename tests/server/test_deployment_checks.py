"""Runs on other machines that can never begin are refused when they are ordered, and by their setting's name."""

from __future__ import annotations

import numpy as np
import pytest

from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.homomorphic.keys import load_client, make_keys
from fedveil.privacy.homomorphic.lattice import Encryptor
from fedveil.privacy.plan import make_plan
from fedveil.server.serving.checks import check_order, check_size, scoreless

OWN = {"data.dataset": "own", "data.labels": ["ham", "spam"]}


def made(preset: str = "digits", **settings) -> Experiment:
    return Experiment.preset(preset).override({key.replace("__", "."): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("experiment", "registered", "why"),
    [
        (made(federation__cohort=5), 3, "federation.cohort = 5: this federation has 3 registered clients"),
        (Experiment.preset("digits").override({"data.dataset": "own"}), 10, "data.labels: must name the classes"),
        (Experiment.preset("spam-demo").override(OWN | {"data.vocabulary": "train"}), 10, "take --set data.vocabulary=hashed"),
    ],
)  # fmt: skip
def test_what_can_never_begin_is_refused(experiment, registered, why) -> None:
    with pytest.raises(SettingsError) as refused:
        check_order(experiment, registered, "")
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("experiment", "registered", "words"),
    [
        (made(federation__cohort=5), 5, ""),
        (made(federation__cohort=5), None, ""),
        (Experiment.preset("digits").override(OWN), 10, ""),
        (Experiment.preset("spam-demo").override(OWN | {"data.vocabulary": "hashed"}), 10, ""),
        (Experiment.preset("spam-demo").override(OWN | {"data.vocabulary": "train"}), 10, "<padding>\n<unknown>\nfree"),
        (Experiment.preset("spam-demo"), 10, ""),
    ],
)
def test_what_may_begin_is_let_through(experiment, registered, words) -> None:
    check_order(experiment, registered, words)


@pytest.mark.parametrize("settings", [{}, {"communication__encoding": "int8"}, {"privacy__protection": "secagg"}])
def test_an_update_that_the_server_would_refuse_is_refused_before(settings) -> None:
    experiment, weights = made(**settings), 10_000
    size = {"int8": 1}.get(experiment.communication.encoding, 4) * weights
    check_size(experiment, weights, size)
    with pytest.raises(SettingsError, match=r"--max-update = .* refuses it"):
        check_size(experiment, weights, size - 1)


def test_a_ciphertext_that_the_server_would_refuse_is_refused_before(tmp_path) -> None:
    experiment, weights = made(privacy__protection="ckks"), 10_000
    plan = make_plan(experiment.privacy, experiment.federation.cohort)
    path = tmp_path / "client.key"
    path.write_bytes(make_keys(plan.lattice)[0])
    path.chmod(0o600)
    sent = Encryptor(load_client(path), plan).encrypt(np.zeros(weights), 1)
    check_size(experiment, weights, len(sent))
    with pytest.raises(SettingsError, match="refuses it"):
        check_size(experiment, weights, len(sent) // 2)


@pytest.mark.parametrize(
    ("settings", "evaluates", "words"),
    [
        ({}, True, None),
        ({}, False, "the server has no test data"),
        ({"privacy__protection": "ckks"}, False, "the server cannot read the model"),
        ({"privacy__clip": 1.0, "privacy__noise_multiplier": 1.0}, False, "clients tell no scores with noise"),
        ({"evaluation__federated": True, "data__validation_fraction": 0.1}, False, None),
    ],
)
def test_a_run_that_nobody_evaluates_says_so_and_what_would_do(settings, evaluates, words) -> None:
    found = scoreless(made(**settings), evaluates)
    assert (found is None) == (words is None)
    if words is not None:
        assert words in found
