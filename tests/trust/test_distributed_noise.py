"""Servers that would have a client send its share of the noise in other units, twice, or where nothing adds it up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from trust.liar import DeployedClient
from trust.test_swallowed_noise import CLIENTS, deployed, first_model, noisy, opened, order, refused, stranger

from fedveil import Experiment
from fedveil.client.learning.contribution import Instructions
from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import ARRAYS, from_sealed
from fedveil.privacy.plan import Plan, make_plan, noise_share

SHARES = {"privacy.noise_at": "distributed", "privacy.noise_multiplier": 2.0, "training.learning_rate": 1e-9}


def plan_of(experiment: Experiment) -> Plan:
    return make_plan(experiment.privacy, CLIENTS)


def upload(client: DeployedClient, given: dict[str, np.ndarray]) -> bytes:
    blob = from_sealed(client.ask("train", given, order(CLIENTS))[ARRAYS], "bfv")
    assert blob is not None
    return blob


def test_a_share_of_noise_is_sent_in_the_units_it_is_accounted_in_or_not_at_all(tmp_path) -> None:
    experiment = noisy("bfv", **SHARES)
    client, given = deployed(experiment, tmp_path), first_model(experiment)
    for reference in (CLIENTS - 1, CLIENTS + 1, 2**40, 1):
        with refused(f"the server announces {reference:,} shares of clients"):
            client.ask("train", given, order(reference))
    assert upload(client, given)


@pytest.mark.parametrize("distribution", ["gaussian", "skellam"])
def test_what_is_sent_is_the_given_model_in_units_and_secret_noise_also_far_beyond_the_range(
    tmp_path, distribution
) -> None:
    experiment = noisy("bfv", **SHARES, **{"privacy.distribution": distribution})
    client, plan = deployed(experiment, tmp_path), plan_of(experiment)
    far = {name: np.full_like(value, 100.0) for name, value in first_model(experiment).items()}
    size = sum(value.size for value in far.values())
    sent = opened(upload(client, far), plan, tmp_path / "keys", far) / plan.unit
    np.testing.assert_allclose(sent, np.rint(sent), atol=1e-6)
    noise = sent - math.floor(plan.grid.limit / plan.unit)
    share = noise_share(experiment.privacy, plan, size)
    assert abs(noise.std() / share.deviation - 1) < 6 / math.sqrt(2 * size)
    assert abs(noise.mean()) < 6 * share.deviation / math.sqrt(size)
    again = deployed(experiment, tmp_path / "again")  # the same seed, and noise that is none of its
    others = opened(upload(again, far), plan, tmp_path / "again" / "keys", far) / plan.unit
    assert abs(np.corrcoef(sent, others)[0, 1]) < 6 / math.sqrt(size)


def test_a_round_that_is_asked_again_gets_the_same_noise_encrypted_anew(tmp_path) -> None:
    """Else the server could average a share of the noise away, that of one client after the other."""
    experiment = noisy("bfv", **SHARES)
    given, plan = first_model(experiment), plan_of(experiment)
    client = deployed(experiment, tmp_path, str(tmp_path / "client.ledger"))
    first, second = upload(client, given), upload(client, given)
    assert first != second
    one, two = (opened(blob, plan, tmp_path / "keys", given) for blob in (first, second))
    np.testing.assert_array_equal(one, two)
    with refused("round 1 is asked again, with another model or other settings"):
        client.ask("train", given, order(CLIENTS) | {"learning-rate": 2e-9})


def test_no_client_sends_a_share_of_noise_in_the_clear_or_in_ciphertexts_that_round() -> None:
    """A server's settings that its own checks let pass; the client's refuse them."""
    for other, why in (("none", "shows each update"), ("ckks", "adds noise of its own to whole numbers")):
        toml = noisy(other).toml()
        assert 'noise_at = "client"' in toml
        with refused(why):
            stranger(toml.replace('noise_at = "client"', 'noise_at = "distributed"')).ask("query")


def test_a_learning_rate_that_shares_are_not_made_for_is_refused() -> None:
    """One example's part of an update grows with the rate, and the shares of noise do not."""
    one_step = {"training.epochs": None, "training.steps": 1, "training.learning_rate": 0.1}
    noise = {"privacy.unit": "example", "privacy.noise_at": "distributed", "privacy.protection": "secagg"}
    experiment = Experiment.preset("digits").override(
        {**one_step, **noise, "privacy.clip": 1.0, "privacy.noise_multiplier": 1.0}
    )
    config = {"server-round": 1, "run": bytes(16), "attempt": 0, "reference-examples": 5}
    assert Instructions.read({**config, "learning-rate": 0.1}, experiment).learning_rate == 0.1
    for rate in (0.2, 100.0):
        with pytest.raises(ProtectionError, match=r"shares of the noise are made for training\.learning_rate = 0\.1"):
            Instructions.read({**config, "learning-rate": rate}, experiment)
