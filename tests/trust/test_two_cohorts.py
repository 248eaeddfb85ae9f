"""A server that sums one cohort, and then the same without one client: the difference would be that client's update."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from trust.federation import Federation, first_model
from trust.liar import Refused

from fedveil.client.learning.contribution import Contributions, Instructions
from fedveil.client.learning.local import train
from fedveil.client.learning.runtime import client_runtime
from fedveil.client.learning.secagg import SecAggClients
from fedveil.core.errors import ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.models.computing import one_thread
from fedveil.privacy.plan import RESERVED
from fedveil.privacy.trust.key_folders import load_registry
from fedveil.privacy.trust.manifest import Manifest

CLIENTS, VICTIM = 6, 3
SETTINGS = Experiment.preset("digits").override({
    "data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": 3, "training.epochs": 1, "model.hidden": [8],
    "model.dropout": 0.3, "privacy.protection": "secagg", "privacy.protection.min_clients": 5, "engine": "sequential",
})  # fmt: skip
ONE, TWO = b"R" * 16, b"S" * 16
REST = [k for k in range(CLIENTS) if k != VICTIM]


def federation(tmp_path: Any, policy: str) -> Federation:
    return Federation(tmp_path, SETTINGS, policy)


def another(here: Federation) -> Manifest:
    """Another manifest of the same run, which its server says it made a minute earlier."""
    made = here.manifest
    registry = load_registry(here.keys / "server") or {}
    earlier = made.created - timedelta(minutes=1)
    return Manifest.of(made.run, made.experiment, "", registry, reproducible=False, created=earlier)


def seeded_update() -> np.ndarray:
    """What the server, who knows the seed, would compare with: the victim's weights if its training repeats."""
    runtime = client_runtime(SETTINGS.toml())
    config = {"server-round": 1, "learning-rate": 0.1, "run": ONE, "attempt": 0, "reference-examples": 1797}
    made = Contributions([VICTIM], Instructions.read(config, SETTINGS), first_model(SETTINGS))
    with one_thread():
        train(runtime, made)
    return np.concatenate([made.weights[name][0].reshape(-1) for name in made.given])


def victims_weights(here: Federation, whole: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """What the difference of two sums says of the victim's weights."""
    examples = whole[0] - rest[0]
    return (whole - rest)[RESERVED:] * here.step() * 1797 / examples


def test_clients_that_were_in_a_larger_sum_sign_no_sum_without_one_of_them(tmp_path) -> None:
    """Each of the five others knows both cohorts, in another run and from a server that began anew."""
    here = federation(tmp_path, "least_difference = 2\n")
    assert here.aggregate(here.begin(ONE))[1] == CLIENTS
    clients = here.begin(TWO, REST)
    with pytest.raises(Refused, match="this client refuses") as refused:
        here.aggregate(clients)
    (said,) = {words for words in refused.value.said if "would show" in words}
    assert (
        "the sum over these 5 clients, with the 1 in which it was revealed before, would show 1 clients or fewer"
        in said
    )
    assert here.ledger(0).totals().answers["train"] == 1  # refused before the second update was made


def test_the_same_cohort_again_and_a_client_that_drops_out_of_the_next_round_differ(tmp_path) -> None:
    here = federation(tmp_path, "least_difference = 2\n")
    here.aggregate(here.begin(ONE))
    clients = here.begin(TWO)
    here.aggregate(clients)  # an identical cohort is no difference
    with pytest.raises(Refused, match="this client refuses"):
        here.aggregate(clients, 2, lost=[VICTIM])
    assert here.ledger(0).totals().answers["reveal"] == 2


def test_training_that_nobody_can_repeat_hides_more_than_the_victim_in_the_difference(tmp_path) -> None:
    """Without a limit on cohorts, the other five have trained anew in between, by the operating system's randomness."""
    here = federation(tmp_path, 'reproducible = "allow"\n')
    true = seeded_update()
    found = {}
    for name, asked in (("secret", ""), ("repeated", "yes")):
        whole = here.aggregate(here.begin(f"{name}-all".ljust(16).encode(), reproducible=asked))
        rest = here.aggregate(here.begin(f"{name}-rest".ljust(16).encode(), REST, reproducible=asked))
        found[name] = float(np.abs(victims_weights(here, whole, rest) - true).max())
    assert found["repeated"] < 1e-4  # what 0.1.0 gave away: the victim's weights
    assert found["secret"] > 1e-2


def test_an_owner_who_says_nothing_refuses_training_that_repeats(tmp_path) -> None:
    with pytest.raises(Refused, match="this client's policy refuses reproducible"):
        federation(tmp_path, "").begin(ONE, reproducible="yes")


@pytest.mark.parametrize("noise", [{}, {"privacy.clip": 1.0, "privacy.noise_multiplier": 1.0}], ids=["plain", "noisy"])
def test_an_attempt_that_failed_is_made_again_with_the_same_update_under_other_masks(
    noise, tmp_path, monkeypatch
) -> None:
    """Attempts differ by masks alone: a server that compares two learns no second draw of training, or of noise."""
    here = Federation(tmp_path, SETTINGS.override(noise), "max_answers = 1\n")
    clients = here.begin(ONE)
    sent: list[np.ndarray] = []
    numbers = SecAggClients.numbers

    def seen(self: SecAggClients, share: Any, *rest: Any) -> Any:
        parts = [part for part in share if part is not None]
        assert len(parts) == (2 if noise else 1)  # the weights, and the noise on them
        sent.append(np.concatenate([part[name].reshape(-1) for part in parts for name in sorted(part)]))
        return numbers(self, share, *rest)

    monkeypatch.setattr(SecAggClients, "numbers", seen)
    with pytest.raises(ProtectionError, match="vectors"):
        here.aggregate(clients, 1, 0, lost=[0, 1, 2])
    assert here.aggregate(clients, 1, 1)[1] == CLIENTS
    assert len(sent) == 2 * CLIENTS
    for first, second in zip(sent[:CLIENTS], sent[CLIENTS:], strict=True):
        np.testing.assert_array_equal(first, second)
    assert here.ledger(0).totals().answers["train"] == 1


def test_a_round_that_was_unmasked_is_not_unmasked_in_another_session_of_a_server_that_forgot(tmp_path) -> None:
    here = federation(tmp_path, "")
    here.aggregate(here.begin(ONE))
    clients = here.begin(here.manifest, REST)
    with pytest.raises(Refused, match="this client refuses") as refused:
        here.aggregate(clients, 1, 1)
    assert any("round 1 was unmasked already" in words for words in refused.value.said)
    with pytest.raises(Refused, match="this client refuses") as refused:
        here.begin(another(here))
    assert any("signed another manifest of this run" in words for words in refused.value.said)


def test_a_cohort_below_the_least_is_refused_before_shares_leave(tmp_path) -> None:
    here = federation(tmp_path, "least_cohort = 6\n")
    with pytest.raises(Refused, match="this client refuses") as refused:
        here.aggregate(here.begin(ONE, REST))
    assert any("in a sum of 5 clients, and least_cohort = 6" in words for words in refused.value.said)
    assert here.aggregate(here.begin(TWO))[1] == CLIENTS
