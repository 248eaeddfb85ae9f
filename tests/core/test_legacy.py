"""Settings of 0.1.0: old keys are read and named, and its records are read whole."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from fedveil import Experiment, SettingsError
from fedveil.core.settings.experiment import known_keys
from fedveil.core.settings.legacy import RENAMED, OldKey

# Of a record that 0.1.0 wrote of its preset digits: every key, of parts that were not chosen too.
RECORD = """
name = "digits"
seed = 3
engine = "batched"
device = "cpu"

[data]
dataset = "digits"
clients = 10
partition = "{partition}"
partition_alpha = {alpha}
partition_classes = 2
partition_shards = {shards}
partition_exponent = 1.0
min_examples = 1
validation_fraction = 0.0
drop_duplicates = true
vocabulary = "train"
vocabulary_size = 4000
max_tokens = 64
test_fraction = 0.2
examples_per_client = 100
examples_spread = 1.0
synthetic_beta = 1.0
synthetic_rule = "own"

[model]
name = "mlp"
hidden = [
    128,
    64,
]
activation = "relu"
dropout = 0.0
normalization = "none"
initialization = "he"
embedding = 32
units = {units}
layers = 1
pooling = "mean"

[training]
epochs = 5
batch_size = 10
learning_rate = 0.3
optimizer = "sgd"
schedule = "constant"
schedule_rounds = 10
schedule_factor = 0.5
schedule_minimum = 0.0

[federation]
rounds = 20
cohort = 5
strategy = "fedavg"

[privacy]
protection = "{protection}"
range = {range}
min_clients = 3
degree = 4096
primes = [
    40,
    60,
]
plain_bits = 45
drop_outs = 0.2
colluders = 0.2
noise_multiplier = 0.0
noise_at = "client"
delta = 1e-5
defence = "none"
prune_fraction = 0.9
leak_guard = "off"
"""


def record(partition="iid", alpha=0.5, shards=2, units=64, protection="none", range=6.0) -> str:
    return RECORD.format(
        partition=partition, alpha=alpha, shards=shards, units=units, protection=protection, range=range
    )


@pytest.fixture(autouse=True)
def said() -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def keys(said) -> list[str]:
    return [str(warning.message).split()[0] for warning in said if warning.category is OldKey]


@pytest.mark.parametrize("protection", ["none", "ckks", "bfv", "secagg"])
@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet", "quantity", "classes"])
def test_a_record_with_defaults_alone_is_read_without_a_word(partition, protection, said) -> None:
    today = {
        "data.partition": partition,
        "privacy.protection": protection,
        "engine": "batched",
        "device": "cpu",
        "seed": 3,
    }
    assert Experiment.parse(record(partition, protection=protection)) == Experiment.preset("digits").override(today)
    assert keys(said) == []


def test_settings_of_parts_that_a_record_does_not_choose_are_dropped_whatever_they_are(said) -> None:
    experiment = Experiment.parse(record("shards", alpha=9.0, shards=3, units=5, range=9.0))
    assert experiment.data.partition.dump() == {"name": "shards", "shards": 3}
    assert experiment.privacy.protection.dump() == {"name": "none"}
    assert "units" not in experiment.model.dump()
    assert keys(said) == ["data.partition_shards"]


def test_an_old_key_in_a_file_is_read_with_a_warning_that_names_the_new_one(said) -> None:
    experiment = Experiment.parse('[data]\npartition = "dirichlet"\npartition_alpha = 0.3\n')
    assert experiment.data.partition.alpha == 0.3
    assert "data.partition_alpha is called data.partition.alpha now" in str(said[0].message)


def test_old_keys_can_be_set_and_are_refused_as_the_new_ones_are(said) -> None:
    found = Experiment().override({"privacy.range": 4.0, "privacy.protection": "ckks"})
    assert found.privacy.protection.range == 4.0
    assert keys(said) == ["privacy.range"]
    with pytest.raises(SettingsError, match=r"alpha is a setting of data.partition = 'dirichlet'"):
        Experiment().override({"data.partition_alpha": 0.3})


def test_an_old_and_a_new_key_for_the_same_setting_are_refused() -> None:
    both = {"data.partition": "dirichlet", "data.partition_alpha": 0.3, "data.partition.alpha": 0.5}
    said = "data.partition_alpha: is called data.partition.alpha now, and both are given"
    with pytest.raises(SettingsError, match=said):
        Experiment().override(both)
    with pytest.raises(SettingsError, match=said):
        Experiment.parse('[data]\npartition_alpha = 0.3\npartition = {name = "dirichlet", alpha = 0.5}\n')


def test_a_networks_settings_in_a_file_of_today_are_not_dropped_for_another_network() -> None:
    with pytest.raises(SettingsError, match=r"hidden is a setting of model.name = 'mlp'"):
        Experiment.parse('[model]\nname = "lstm"\nhidden = [64, 64]\n')


def test_every_old_key_has_a_key_of_today_and_its_default() -> None:
    today = known_keys()
    for old, new in RENAMED.items():
        assert f"{new.kind.prefix}.{new.name}" in today
        assert old not in today
        having = [
            part for part in new.kind.table if new.name in new.kind.table.declared(part, "key").settings.model_fields
        ]
        for part in having if new.default is not None else []:
            default = new.kind.table.declared(part, "key").settings.model_fields[new.name].default
            assert (list(default) if isinstance(default, tuple) else default) == new.default


def test_the_command_line_says_an_old_key_once_and_plainly_on_standard_error(tmp_path) -> None:
    (tmp_path / "old.toml").write_text('[data]\npartition = "dirichlet"\npartition_alpha = 0.3\n')
    words = [sys.executable, "-m", "fedveil", "run", "old.toml", "--show", "--set", "data.partition_alpha=0.4"]
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stderr == "warning data.partition_alpha is called data.partition.alpha now; the old key will go\n"
    assert "alpha = 0.4" in answer.stdout


def test_the_privacy_that_keys_of_0_1_0_were_made_for_is_read(tmp_path, said) -> None:
    from fedveil.core.settings.sections import Privacy
    from fedveil.privacy.trust.key_folders import AGREED, check_agreed

    text = RECORD.format(partition="iid", alpha=0.5, shards=2, units=64, protection="secagg", range=4.0)
    (tmp_path / AGREED).write_text(text.split("[privacy]")[1])
    check_agreed(Privacy(protection={"name": "secagg", "range": 4.0}), tmp_path, 0)
    with pytest.raises(Exception, match=r"privacy.protection.range = 6.0, and this client's keys were made for 4.0"):
        check_agreed(Privacy(protection="secagg"), tmp_path, 0)
