"""A server that asks for a round again and again, under old and new names, to average the noise away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trust.federation import first_model
from trust.liar import DeployedClient, Refused, refused_for

from fedveil.client.node.trainer import ClientProfile
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import from_arrays
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.dp.accounting.guarantee import calibrated
from fedveil.privacy.trust.ledger import Ledger

NOISY = Experiment.preset("digits").override({
    "data.clients": 3, "federation.cohort": 3, "federation.rounds": 3, "model.hidden": [4], "privacy.clip": 1.0,
    "privacy.noise_multiplier": 2.0,
})  # fmt: skip
ROUND = {"server-round": 1, "learning-rate": 0.1}
GIVEN = first_model(NOISY)


class Node:
    """One client's data, ledger and policy, and whichever servers come."""

    def __init__(self, folder: Path, policy: str = "") -> None:
        self.ledger_path = folder / "client.ledger"
        (folder / "policy.toml").write_text(policy)
        self.profile = ClientProfile(0, "digits:1/3", "", str(folder / "policy.toml"), str(self.ledger_path))

    def server(self, run_id: int = 1, experiment: Experiment = NOISY) -> DeployedClient:
        """The client as a new server meets it: an empty context, a run of its own."""
        return DeployedClient(self.profile, {"experiment": experiment.toml()}, run_id=run_id)

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.ledger_path, "digits:1/3")


def sent(here: DeployedClient, **config: Any) -> np.ndarray:
    """The update that a client answers with, as one vector."""
    arrays = here.ask("train", GIVEN, {**ROUND, **config})["arrays"]
    return np.concatenate([value.reshape(-1) for value in from_arrays(arrays).values()])  # type: ignore[arg-type]


def test_thirty_answers_to_one_round_are_one_answer(tmp_path) -> None:
    node = Node(tmp_path, "max_rounds = 3\nmin_noise = 1.0\n")
    first = sent(node.server())
    for _ in range(29):
        np.testing.assert_array_equal(sent(node.server()), first)  # the same noise: nothing to average
    totals = node.ledger.totals()
    assert totals.answers["train"] == 1
    assert totals.epsilon(1e-5) == pytest.approx(gaussian_epsilon(2.0, 1, 1e-5))


@pytest.mark.parametrize(
    "changed",
    [{"learning-rate": 0.2}, {"proximal-mu": 1e-9}, {"anything": 1}],
)
def test_another_question_about_a_round_is_refused(tmp_path, changed) -> None:
    node = Node(tmp_path)
    sent(node.server())
    with pytest.raises(Refused, match="this client refuses; its own log says why") as refused:
        sent(node.server(), **changed)
    assert any("round 1 is asked again, with another model or other settings" in words for words in refused.value.said)


def test_another_model_or_other_settings_are_another_question(tmp_path) -> None:
    node = Node(tmp_path)
    sent(node.server())
    with pytest.raises(Refused, match="this client refuses"):
        node.server().ask("train", {name: value + 1 for name, value in GIVEN.items()}, ROUND)
    with pytest.raises(Refused, match="this client refuses"):
        sent(node.server(experiment=NOISY.override({"seed": 8})))


def test_an_old_round_is_not_answered_again_and_its_bytes_are_gone(tmp_path) -> None:
    node = Node(tmp_path)
    here = node.server()
    for number in (1, 2):
        sent(here, **{"server-round": number})
    with pytest.raises(Refused, match="this client refuses"):
        sent(here)
    kept = node.ledger._journal.connection.execute("SELECT count(*) FROM answers").fetchone()
    assert kept == (1,)


@pytest.mark.parametrize("number", [0, -1, 4, 10**6])
def test_a_round_that_the_run_has_not_is_refused(tmp_path, number) -> None:
    with refused_for(f"the server asks for round {number} of a run with federation.rounds = 3"):
        sent(Node(tmp_path).server(), **{"server-round": number})


def test_servers_in_turn_spend_one_budget(tmp_path) -> None:
    """Two servers, each with runs of its own: epsilon composes over all of them, and ends for all."""
    node = Node(tmp_path, "max_epsilon = 4.0\nmin_noise = 2.0\n")
    for answers, (run_id, number) in enumerate([(1, 1), (2, 1), (1, 2)], start=1):
        sent(node.server(run_id), **{"server-round": number})
        assert node.ledger.totals().epsilon(1e-5) == pytest.approx(gaussian_epsilon(2.0, answers, 1e-5))
    assert gaussian_epsilon(2.0, 3, 1e-5) < 4.0 < gaussian_epsilon(2.0, 4, 1e-5)
    for run_id in (1, 2, 3):
        with pytest.raises(Refused, match="this client refuses") as refused:
            sent(node.server(run_id), **{"server-round": 3})
        assert any("one more answer would spend epsilon" in words for words in refused.value.said)
    np.testing.assert_array_equal(  # what was answered may be asked again: it tells nothing new
        sent(node.server(1), **{"server-round": 2}), sent(node.server(1), **{"server-round": 2})
    )


def test_runs_of_a_new_name_are_counted_together(tmp_path) -> None:
    node = Node(tmp_path, "max_answers = 5\n")
    for run_id in range(5):
        sent(node.server(run_id))
    with pytest.raises(Refused, match="this client refuses") as refused:
        sent(node.server(5))
    assert any("it has given 5 answers, and max_answers = 5" in words for words in refused.value.said)


def test_an_answer_without_noise_ends_every_budget_of_epsilon(tmp_path) -> None:
    node = Node(tmp_path)
    sent(node.server(1, NOISY.override({"privacy.noise_multiplier": 0.0})))
    (tmp_path / "policy.toml").write_text("max_epsilon = 100.0\n")
    with pytest.raises(Refused, match="this client refuses") as refused:
        sent(node.server(2))
    assert any("answers before had no noise, so that no epsilon holds" in words for words in refused.value.said)


def test_a_ledger_that_cannot_be_used_refuses_and_its_place_stays_at_the_client(tmp_path) -> None:
    node = Node(tmp_path)
    sent(node.server())
    content = node.ledger_path.read_bytes()
    other = tmp_path / "cut.ledger"
    other.write_bytes(content[: len(content) // 2])
    other.chmod(0o600)
    node.profile = replace(node.profile, ledger=str(other))
    with pytest.raises(Refused) as refused:
        sent(node.server())
    assert refused.value.reason == "this client refuses; its own log says why"
    assert any("cut.ledger: the privacy ledger is damaged" in words for words in refused.value.said)
    assert other.read_bytes() == content[: len(content) // 2]  # it never begins anew


def test_a_client_that_takes_turns_answers_no_more_rounds_than_it_has_turns(tmp_path) -> None:
    """Its noise is made for one round in three; a server that asks it in each would have three answers with that noise."""
    turns = {
        "federation.cohort": 1,
        "federation.sampling": "order",
        "privacy.noise_multiplier": None,
        "privacy.epsilon": 6.0,
    }
    here = Node(tmp_path).server(experiment=NOISY.override(turns))
    first = sent(here, **{"server-round": 2})
    np.testing.assert_array_equal(sent(here, **{"server-round": 2}), first)
    with pytest.raises(Refused, match="this client refuses") as refused:
        sent(here, **{"server-round": 3})
    assert any("the server asks in more than 1 rounds" in words for words in refused.value.said)


def test_the_least_noise_of_an_owner_is_that_which_a_budget_asks_for(tmp_path) -> None:
    """The settings do not say it; the client finds it by itself."""
    budget = NOISY.override({"privacy.noise_multiplier": None, "privacy.epsilon": 6.0})
    found = calibrated(budget, 1).privacy.multiplier
    assert 1 < found < 2
    sent(Node(tmp_path, "min_noise = 1.0\n").server(experiment=budget))
    (tmp_path / "more").mkdir()
    with pytest.raises(Refused, match=r"this client.s policy refuses privacy\.calibrated"):
        sent(Node(tmp_path / "more", "min_noise = 2.0\n").server(experiment=budget))
