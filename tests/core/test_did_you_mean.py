"""An unknown setting is answered with the one that is meant, by whatever name people and other frameworks know it."""

from __future__ import annotations

import pytest

from fedveil import Experiment
from fedveil.core.errors import SettingsError, closest, nearest
from fedveil.core.settings.experiment import known_keys
from fedveil.core.settings.explanations import CALLED, MEANING, meant

TYPED = {  # what people type -> what they mean
    "lr": "training.learning_rate",
    "training.lr": "training.learning_rate",
    "model.lr": "training.learning_rate",
    "federation.rate": None,
    "local_epochs": "training.epochs",
    "training.localEpochs": "training.epochs",
    "training.epoch": "training.epochs",
    "federation.epochs": "training.epochs",
    "batch": "training.batch_size",
    "training.batch-size": "training.batch_size",
    "mu": "training.proximal_mu",
    "federation.strategy.mu": "training.proximal_mu",
    "momentum": "training.momentum' or 'federation.strategy.momentum",
    "num_rounds": "federation.rounds",
    "rounds": "federation.rounds",
    "num-server-rounds": "federation.rounds",
    "training.rounds": "federation.rounds",
    "comm_round": "federation.rounds",
    "fraction_fit": "federation.cohort' (a number of clients, no share of them)?",
    "fraction-train": "federation.cohort' (a number of clients, no share of them)?",
    "clients_per_round": "federation.cohort",
    "client_num_per_round": "federation.cohort",
    "num_clients": "data.clients",
    "federation.clients": "data.clients",
    "clients": "data.clients",
    "alpha": "data.partition.alpha",
    "data.alpha": "data.partition.alpha",
    "sigma": "privacy.noise_multiplier",
    "clip": "privacy.clip",
    "training.clip": "privacy.clip",
    "federation.model": "model.name",
    "trainning.epochs": "training.epochs",
    "trainingepochs": "training.epochs",
    "federation.patiance": "federation.patience",
}


@pytest.mark.parametrize("key", TYPED)
def test_what_people_type_is_answered_with_what_they_mean(key) -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment.preset("digits").override({key: 1})
    assert f"{key}: unknown setting" in str(refused.value)
    if TYPED[key] is not None:
        assert f"did you mean '{TYPED[key]}" in str(refused.value)


def test_names_of_other_frameworks_lead_to_settings_that_exist_and_are_names_of_none() -> None:
    assert set(CALLED) <= set(known_keys())
    assert len(MEANING) == sum(len(names.split()) for names in CALLED.values()) > 250  # no name means two things
    for name, key in MEANING.items():
        assert name not in known_keys()
        assert f"'{key}'" in meant(name, known_keys())


@pytest.mark.parametrize("key", ["federation.zzz", "federation.foo_bar"])
def test_where_nothing_is_close_it_is_said_what_the_section_has(key) -> None:
    with pytest.raises(
        SettingsError, match=r"unknown setting; \[federation\] has rounds, cohort, sampling, strategy, "
    ):
        Experiment.preset("digits").override({key: 1})


def test_where_no_section_is_close_it_is_said_which_there_are() -> None:
    with pytest.raises(SettingsError, match="zzz: unknown setting; sections are data, model, training, federation, "):
        Experiment.preset("digits").override({"zzz": 1})


def test_a_section_of_another_framework_is_answered_by_each_of_its_settings() -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment.parse("[server]\nnum_rounds = 5\n[client.optimizer]\nlr = 0.1\n[empty]\n")
    lines = str(refused.value).removeprefix("settings: ").split("\n")
    assert lines[:2] == [
        "server.num_rounds: unknown setting; did you mean 'federation.rounds'?",
        "client.optimizer.lr: unknown setting; did you mean 'training.learning_rate'?",
    ]
    assert lines[2].startswith("empty: unknown setting")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"federation.strategy.beta_3": 1},
            "federation.strategy.beta_3: unknown setting of federation.strategy = 'fedavg', which has no settings of its own; "
            "federation.strategy.beta_2 is a setting of federation.strategy = 'fedadam' or 'fedyogi'",
        ),
        (
            {"federation.strategy.server_lr": 1},
            "which has no settings of its own; federation.strategy.learning_rate is a setting of federation.strategy = 'fedavgm' or ",
        ),
        ({"federation.strategy": "fedadam", "federation.strategy.beta_3": 1}, "did you mean 'federation.strategy.beta_2'?"),
        ({"federation.strategy": "fedadam", "federation.strategy.zzz": 1}, "which has learning_rate, tau, beta_1, beta_2"),
        ({"data.partition.concentration": 1}, "data.partition.alpha is a setting of data.partition = 'dirichlet'"),
        ({"federation.strategy.lr": 1}, "did you mean 'training.learning_rate'?"),
    ],
)  # fmt: skip
def test_a_setting_that_a_part_lacks_is_answered_with_what_it_has_and_who_has_it(settings, said) -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment.preset("digits").override(settings)
    assert said in str(refused.value)


def test_case_and_hyphens_make_no_difference() -> None:
    assert nearest("MNIST", ["digits", "mnist"]) == "; did you mean 'mnist'?"
    assert nearest("Fed-Avg", ["krum", "fedavg"]) == "; did you mean 'fedavg'?"
    assert nearest("Label", ["label", "text"]) == "; did you mean 'label'?"
    assert closest("spam_demo", ["sms", "spam-demo"]) == "spam-demo"
    assert closest("zzz", ["sms", "spam-demo"]) is None
