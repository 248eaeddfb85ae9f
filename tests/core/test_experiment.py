"""Settings: what is refused and how it is said, and that TOML loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import Experiment, SettingsError
from fedveil.core import catalog
from fedveil.core.settings.experiment import known_keys, parse_assignments


def refused(*assignments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        Experiment().override(parse_assignments(assignments))
    return str(caught.value)


@pytest.mark.parametrize("name", list(catalog.PRESETS))
def test_every_preset_is_valid_and_survives_toml(name: str) -> None:
    experiment = Experiment.preset(name)
    assert experiment.name == name
    assert Experiment.parse(experiment.toml()) == experiment


@pytest.mark.parametrize("name", list(catalog.PRESETS))
def test_every_preset_opens_with_a_comment_that_says_what_to_expect(name: str) -> None:
    from importlib import resources

    text = resources.files("fedveil.simulations.presets").joinpath(f"{name}.toml").read_text("utf-8")
    comment = " ".join(line for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    assert any(word in comment for word in ("accuracy", "F1")), comment
    assert any(word in comment for word in (" s ", " s:", " s.", " s,", " seconds")), comment


@given(
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-6, 1e3),
    hidden=st.lists(st.integers(1, 500), max_size=4),
    batch=st.one_of(st.integers(1, 1000), st.just("full")),
    labels=st.one_of(st.none(), st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=4)),
)
def test_toml_gives_back_the_same_settings(seed, rate, hidden, batch, labels) -> None:
    experiment = Experiment(
        seed=seed,
        model={"hidden": hidden},
        training={"learning_rate": rate, "batch_size": batch},
        data={"labels": labels} if labels else {},
    )
    assert Experiment.parse(experiment.toml()) == experiment


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("trainning.epochs=5", "did you mean 'training.epochs'"),
        ("training.epoch=5", "training.epoch: unknown setting; did you mean 'training.epochs'"),
        ("training.learning_rate=-1", "training.learning_rate = -1: must be greater than 0"),
        ("training.learning_rate=nan", "training.learning_rate = nan: must be"),
        ("training.epochs=1.5", "training.epochs = 1.5: must be"),
        ("training.epochs=true", "training.epochs = True: must be"),
        ("training.batch_size=fulll", "training.batch_size = 'fulll': must be a whole number, or 'full'"),
        ("data.clients=0", "data.clients = 0: must be greater than or equal to 1"),
        ("data.dataset=mnsit", "did you mean 'mnist'"),
        ("data.partition=dirichlett", "did you mean 'dirichlet'"),
        ("model.name=lsmt", "did you mean 'lstm'"),
        ("federation.strategy=fedadm", "did you mean 'fedadam'"),
        ("privacy.protection=non", "did you mean 'none'"),
        ("federation.cohort=11", "federation.cohort = 11: larger than the population; data.clients = 10"),
        ("engine=quick", "engine = 'quick': must be 'auto', 'batched', 'sequential', 'processes' or 'ray'"),
        ("seed=-1", "seed = -1"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("name=a/b", "name = 'a/b'"),
        ("model.normalization=batch", "averaging them gives a model that fits nobody. Use 'layer'"),
        ("training.nesterov=true", "needs training.optimizer = 'sgd' and training.momentum above 0"),
        ("federation.strategy=fedprox", "set training.proximal_mu"),
        ("evaluation.federated=true", "set data.validation_fraction"),
        ("evaluation.cohort=20", "larger than the population"),
        ("communication.encoding=int4", "communication.encoding = 'int4': must be 'float32', 'float16' or 'int8'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_what_was_given_and_what_is_allowed(assignment, said) -> None:
    assert said in refused(assignment)


def test_settings_that_cannot_work_together_are_refused() -> None:
    assert "only sgd takes momentum" in refused("training.optimizer=adam", "training.momentum=0.9")
    assert "needs at least 7" in refused(
        "federation.strategy=bulyan", "federation.byzantine_clients=1", "federation.cohort=6"
    )
    assert "at most cohort - byzantine_clients - 2" in refused(
        "federation.strategy=multikrum", "federation.strategy.selected=9"
    )
    assert "must be smaller" in refused("training.schedule=cyclic", "training.schedule_minimum=0.1")
    assert "must be smaller" in refused("training.schedule=cosine", "training.schedule_minimum=0.2")


@pytest.mark.parametrize("protection", ["ckks", "bfv", "secagg"])
@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_protected_updates_have_no_other_encoding(protection, encoding) -> None:
    said = refused(f"privacy.protection={protection}", f"communication.encoding={encoding}")
    assert f"communication.encoding = '{encoding}': cannot work with privacy.protection = '{protection}'" in said


def test_a_setting_asked_for_that_would_change_nothing_is_refused() -> None:
    assert "has no effect with training.schedule = 'constant'; it needs training.schedule = 'step' or" in refused(
        "training.schedule_rounds=3"
    )
    assert "has no effect without noise: privacy.epsilon, or privacy.noise_multiplier" in refused("privacy.delta=0.001")
    assert "it needs data.dataset = 'own'" in refused("data.path=foo.csv")
    assert "takes its place" in refused("training.epochs=3", "training.steps=5")
    assert "it needs privacy.protection.profile = 'own'" in refused(
        "privacy.protection=ckks", "privacy.protection.degree=8192"
    )


def test_nothing_after_the_sign_gives_the_default_back() -> None:
    assert (
        Experiment.preset("mnist-2nn")
        .override(parse_assignments(["federation.target_accuracy="]))
        .federation.target_accuracy
        is None
    )


def test_all_mistakes_are_said_at_once() -> None:
    said = refused("training.epochs=0", "data.clients=0")
    assert "training.epochs" in said
    assert "data.clients" in said


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'mnist-mlp'"):
        Experiment.preset("mnist-mpl")


def test_a_settings_file_that_is_missing_or_broken_is_named(tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read the settings file .*none.toml"):
        Experiment.load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    with pytest.raises(SettingsError, match=r"broken.toml is not valid TOML.*line 1"):
        Experiment.load(broken)
    broken.write_text("[data]\nclient = 3\n")
    with pytest.raises(SettingsError, match=r"broken.toml: data.client: unknown setting; did you mean 'data.clients'"):
        Experiment.load(broken)


def test_a_settings_file_names_its_experiment_after_itself(tmp_path) -> None:
    (tmp_path / "my first run.toml").write_text("seed = 3\n")
    assert Experiment.load(tmp_path / "my first run.toml").name == "my-first-run"


def test_assignments_are_toml_values_or_plain_words() -> None:
    read = parse_assignments(["a=1", "b=0.5", "c=true", "d=word", "e=[1, 2]", 'f="x y"', "g=a=b"])
    assert read == {"a": 1, "b": 0.5, "c": True, "d": "word", "e": [1, 2], "f": "x y", "g": "a=b"}
    with pytest.raises(SettingsError, match="must be KEY=VALUE"):
        parse_assignments(["training.epochs"])


def test_an_experiment_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Experiment().seed = 3


def test_the_names_that_scripts_rely_on_are_there() -> None:
    names = """data.dataset data.clients data.partition data.partition.alpha data.partition.classes data.vocabulary
    data.labels model.name training.epochs training.batch_size training.learning_rate training.optimizer
    training.schedule federation.rounds federation.cohort federation.strategy federation.target_accuracy
    privacy.protection communication.encoding evaluation.every seed engine device"""
    assert set(names.split()) <= set(known_keys())
