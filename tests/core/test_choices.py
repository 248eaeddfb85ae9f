"""A part chosen by name: its own settings, in any order, explained as its own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from itertools import permutations
from types import ModuleType

import pytest

from fedveil import Experiment, SettingsError
from fedveil.core import catalog
from fedveil.core.catalog import Table
from fedveil.core.declaration import declaration, part
from fedveil.core.settings.choice import Model, PartitionChoice, ProtectionChoice
from fedveil.core.settings.experiment import known_keys
from fedveil.core.settings.keys import describe, values
from fedveil.core.settings.section import Section


def refused(settings: dict) -> str:
    with pytest.raises(SettingsError) as caught:
        Experiment().override(settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "pairs", permutations([("data.partition", "dirichlet"), ("data.partition.alpha", 0.3), ("training.epochs", 2)])
)
def test_a_part_and_its_settings_may_be_given_in_any_order(pairs) -> None:
    partition = Experiment().override(dict(pairs)).data.partition
    assert (partition.name, partition.settings.alpha, partition.alpha) == ("dirichlet", 0.3, 0.3)


@pytest.mark.parametrize(
    "spelled",
    [
        {"data.partition": {"name": "dirichlet", "alpha": 0.3}},
        {"data.partition.name": "dirichlet", "data.partition.alpha": 0.3},
        {"data.partition": "dirichlet", "data.partition.alpha": 0.3},
    ],
)
def test_a_table_and_its_keys_say_the_same(spelled) -> None:
    same = Experiment.parse('[data.partition]\nname = "dirichlet"\nalpha = 0.3\n')
    assert Experiment().override(spelled) == same
    assert hash(Experiment().override(spelled)) == hash(same)


def test_a_part_without_settings_is_its_name_in_toml_and_one_with_settings_a_table() -> None:
    text = Experiment().toml()
    assert 'partition = "iid"\n' in text
    assert "[model]\nname = " in text
    assert '[data.partition]\nname = "shards"\nshards = 2\n' in Experiment.preset("mnist-shards").toml()


@pytest.mark.parametrize("name", catalog.PROTECTIONS)
def test_choices_survive_toml_pickling_and_copying(name) -> None:
    experiment = Experiment().override({"privacy.protection": name})
    for again in (
        Experiment.parse(experiment.toml()),
        pickle.loads(pickle.dumps(experiment)),
        copy.deepcopy(experiment),
    ):
        assert again == experiment
        assert again.toml() == experiment.toml()


def test_another_part_keeps_what_was_set_and_it_has_too_and_drops_the_rest() -> None:
    lstm = Experiment().override({"model.name": "lstm", "model.units": 8, "model.embedding": 16, "model.dropout": 0.3})
    mlp = lstm.override({"model.name": "mlp"}).model
    assert mlp == Model(name="mlp", embedding=16, dropout=0.3)
    masked = Experiment().override({"privacy.protection": "secagg", "privacy.protection.min_clients": 5})
    assert masked.override({"privacy.protection": "ckks"}).privacy.protection == ProtectionChoice("ckks", min_clients=5)
    assert masked.override({"privacy.protection": None}).privacy.protection == ProtectionChoice()


def test_nothing_gives_a_parts_setting_its_default_back() -> None:
    skewed = Experiment().override({"data.partition": "dirichlet", "data.partition.alpha": 0.3})
    assert skewed.override({"data.partition.alpha": None}).data.partition == PartitionChoice("dirichlet", alpha=0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.partition": "dirichlet", "data.partition.alhpa": 1.0}, "'dirichlet'; did you mean 'data.partition.alpha'?"),
        ({"data.partition.alpha": 1.0}, "of data.partition = 'iid'; alpha is a setting of data.partition = 'dirichlet'"),
        ({"data.partition": "dirichlet", "data.partition.alpha": -1}, "data.partition.alpha = -1: must be greater than 0"),
        ({"data.partition": 3}, "data.partition = 3: must be a name, or a table of a name"),
        ({"model.units": 3}, "model.units: unknown setting of model.name = 'mlp'; units is a setting of model.name = 'lstm'"),
        ({"model.hiden": [3]}, "did you mean 'model.hidden'?"),
        ({"model.hidden": ["a"]}, "model.hidden = 'a': must be a whole number"),
        ({"model.name": "lstm", "model.pooling": "sum"}, "model.pooling = 'sum': must be 'mean' or 'last'"),
        ({"privacy.protection": "bfv", "privacy.protection.profile": "fast"}, "must be 'exact-small' or 'own'"),
        ({"privacy.protection": "secagg", "privacy.protection.degree": 4096}, "privacy.protection = 'ckks' or 'bfv'"),
        ({"data.vocabulary": "hashed"}, "has no effect with data.dataset = 'digits'; it needs data.dataset = 'sms' or"),
    ],
)  # fmt: skip
def test_a_setting_is_explained_by_the_part_that_is_chosen(settings, said) -> None:
    assert said in refused(settings)


def test_parts_and_settings_that_cannot_be_used_are_said_at_once() -> None:
    said = refused({"data.partition": "dirichlett", "training.epochs": 0, "model.units": 3})
    assert all(word in said for word in ("data.partition", "training.epochs", "model.units"))


def test_the_same_mistake_is_said_where_a_choice_is_made_by_itself() -> None:
    with pytest.raises(SettingsError, match=r"model\.units: unknown setting of model\.name = 'mlp'"):
        Model(units=3)
    with pytest.raises(SettingsError, match=r"data\.partition\.alpha = -1: must be greater than 0"):
        PartitionChoice("dirichlet", alpha=-1)


def test_a_choice_is_frozen_and_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        Model().name = "lstm"
    with pytest.raises(AttributeError, match=r"model\.units: model\.name = 'mlp' has no such setting"):
        _ = Model().units


def test_a_parts_setting_cannot_be_called_name() -> None:
    class Named(Section):
        name: str = ""

    with pytest.raises(TypeError, match=r"Named\.name: a part's setting cannot be called `name`"):
        part(Named)(lambda: None)
    with pytest.raises(TypeError, match="must be a subclass of"):
        part(dict)(lambda: None)


def test_a_setting_without_a_default_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needed(Section):
        depth: int

    module = ModuleType("my_parts")
    module.deal = part(Needed)(lambda pool, settings, rng: None)
    monkeypatch.setitem(sys.modules, "my_parts", module)
    assert "data.partition.depth: must be given" in refused({"data.partition": "my_parts:deal"})
    given = {"data.partition": "my_parts:deal", "data.partition.depth": 2}
    assert Experiment().override(given).data.partition.depth == 2


def test_every_key_of_every_part_is_known_and_described() -> None:
    keys = known_keys()
    assert {"data.partition.alpha", "data.dataset.beta", "model.name", "model.units", "privacy.protection.range",
            "privacy.defence.fraction"} <= set(keys)  # fmt: skip
    assert keys["privacy.protection.degree"].startswith("ckks, bfv: ")
    assert all(keys.values())
    assert set(values(Experiment())) <= set(keys)


TABLES = [catalog.DATASETS, catalog.PARTITIONS, catalog.MODELS, catalog.PROTECTIONS, catalog.DEFENCES]


@pytest.mark.parametrize(
    ("table", "name"), [(t, n) for t in TABLES for n in t], ids=lambda v: v if isinstance(v, str) else v.kind
)
def test_every_part_declares_itself_and_is_described_with_its_settings(table: Table, name: str) -> None:
    declared = table.declared(name, "key")
    if name != "none":
        assert declared == declaration(table.load(name, "key"))
    text = describe(table, name, "key")
    assert text.startswith(f"{name}  {table[name]}")
    assert len(text.splitlines()) == 1 + len(declared.settings.model_fields)
    assert all(field.description for field in declared.settings.model_fields.values())
    assert declared.settings() == declared.settings()  # every setting has a default


def test_a_choice_that_comes_from_another_process_is_found_in_a_table_of_this_one() -> None:
    code = (
        "import pickle, sys\nfrom fedveil.core.settings.choice import Model\n"
        "model = Model(name='lstm', units=8)\nhash(model)\nsys.stdout.buffer.write(pickle.dumps(model))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert {Model(name="lstm", units=8): "found"}[pickle.loads(answer.stdout)] == "found"
