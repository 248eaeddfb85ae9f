"""Two runs whose cohorts differ by one client: what their sums give away, what spoils it, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedveil import Experiment, SettingsError, run
from fedveil.cli import app
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.server.rounds.captures import read_captures
from fedveil.simulations.attacks.lab.lab import attack
from fedveil.simulations.attacks.lab.pairs import anew

SIX = {
    "data.clients": 6, "federation.cohort": 6, "federation.rounds": 1, "training.epochs": 2, "privacy.protection": "secagg",
    "federation.capture": True, "engine": "sequential", "data.client_examples": 10,
}  # fmt: skip


def messages(**settings: Any) -> Experiment:
    """Made-up messages, a word table, dropout."""
    return Experiment.preset("spam-demo").override({**SIX, "model.dropout": 0.2, **settings})


def record(experiment: Experiment, folder: Path) -> Path:
    return run(experiment, out=folder, plots=False).run_dir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two recorded runs of secure aggregation, of six clients and of five of these."""
    folder = tmp_path_factory.mktemp("runs")
    return record(messages(), folder / "six"), record(messages(**{"federation.cohort": 5}), folder / "five")


def compare(name: str, *runs: Path, **settings: Any) -> Any:
    return attack(name, Experiment.received((runs[0] / "experiment.toml").read_text()), against=runs, **settings)


def test_the_sums_of_two_runs_give_one_client_away_with_its_words(pair) -> None:
    outcome = compare("differencing", *pair)
    assert outcome.refused is None
    assert outcome.mean()["cosine"] > 0.99999
    assert outcome.mean()["relative_error"] < 1e-3
    assert outcome.mean(baseline=True)["cosine"] < 0.95
    swapped = compare("differencing", *reversed(pair))
    assert swapped.scores == outcome.scores
    words = compare("words", *pair)
    assert words.mean()["recall"] == words.mean()["precision"] == 1.0
    assert words.observer == "two-runs"


def test_models_of_one_round_tell_as_much_as_captures(pair, tmp_path) -> None:
    bare = []
    for folder in pair:
        shutil.copytree(folder, tmp_path / folder.name)
        shutil.rmtree(tmp_path / folder.name / "captures")
        bare.append(tmp_path / folder.name)
    assert compare("differencing", *bare).scores == compare("differencing", *pair).scores


def test_a_round_drawn_anew_is_the_runs_own_where_nothing_is(pair) -> None:
    """What stands for deployed clients is held to a run through all messages, seed for seed."""
    (five,) = read_captures(pair[1])
    (six,) = read_captures(pair[0])
    experiment = messages(**{"federation.cohort": 5})
    federated = load(experiment.data, 0)
    network = build(federated.dataset.task, experiment.model, Stream(0))
    same = anew(experiment, federated, network, six, list(five.trained), seed=0)
    for name, value in five.after.items():
        np.testing.assert_array_equal(same.after[name], value)
    other = anew(experiment, federated, network, six, list(five.trained), seed=1)
    assert any((other.after[name] != value).any() for name, value in five.after.items())


def test_training_that_nobody_can_repeat_spoils_the_difference() -> None:
    mean = {}
    for observer in ("two-runs", "two-deployed-runs"):
        settings = {
            "observer": observer,
            "trials": 2,
            "asked": frozenset({"training.batch_size", "data.client_examples"}),
        }
        mean[observer] = attack("differencing", messages(**{"training.batch_size": 5}), **settings).mean()
    assert mean["two-runs"]["relative_error"] < 1e-3
    assert mean["two-deployed-runs"]["relative_error"] > 1.0  # as wrong as guessing nothing
    assert mean["two-deployed-runs"]["cosine"] < 0.8


def test_nothing_to_draw_is_nothing_to_hide_behind() -> None:
    """A client of one example and one step draws nothing but dropout: without that, deployment changes nothing."""
    plain = messages(**{"model.dropout": 0.0, "training.epochs": 1})
    found = attack("differencing", plain, observer="two-deployed-runs", trials=1)
    assert found.mean()["cosine"] > 0.999


def test_noise_is_measured_and_not_refused(tmp_path) -> None:
    noisy = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.05, "data.vocabulary": "hashed"}
    six, five = (record(messages(**noisy, **{"federation.cohort": n}), tmp_path / str(n)) for n in (6, 5))
    outcome = compare("differencing", six, five)
    assert outcome.refused is None
    assert outcome.mean()["relative_error"] > 1.0


@pytest.mark.parametrize("noise_at", ["client", "server"])
def test_noise_that_is_drawn_anew_does_not_cancel(noise_at) -> None:
    settings = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.5, "privacy.noise_at": noise_at}
    plain = {"model.dropout": 0.0, "training.epochs": 1, "data.vocabulary": "hashed"}
    found = attack("differencing", messages(**plain, **settings), observer="two-deployed-runs", trials=1)
    assert found.mean()["cosine"] < 0.3


def test_who_holds_the_key_compares_sums_of_ciphertexts(tmp_path) -> None:
    sealed = {"privacy.protection": "ckks"}
    six, five = (record(messages(**sealed, **{"federation.cohort": n}), tmp_path / str(n)) for n in (6, 5))
    assert compare("differencing", six, five).mean()["cosine"] > 0.99


def test_what_cannot_be_compared_is_refused_with_the_reason(pair, tmp_path) -> None:
    six, five = pair
    with pytest.raises(SettingsError, match="the cohorts differ by 0 client"):
        compare("differencing", six, six)
    faster = record(messages(**{"federation.cohort": 5, "training.learning_rate": 0.01}), tmp_path / "faster")
    with pytest.raises(SettingsError, match=r"trained in different ways \(training.learning_rate is .* and 0.01\)"):
        compare("differencing", six, faster)
    other = record(messages(**{"federation.cohort": 5, "seed": 1}), tmp_path / "other")
    with pytest.raises(SettingsError, match="seed is 0 and 1"):
        compare("differencing", six, other)
    with pytest.raises(SettingsError, match="looks at one run, and --against names 2"):
        compare("differencing", six, five, observer="aggregate")
    with pytest.raises(SettingsError, match="compares two runs, and --against names 1"):
        compare("differencing", six)
    shutil.copytree(five, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "captures")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(SettingsError, match="has no captures, and its models tell no round's mean"):
        compare("differencing", six, tmp_path / "bare")


def test_cohorts_that_differ_by_too_many_are_refused(pair, tmp_path) -> None:
    many = {"data.clients": 12, "data.client_examples": 5}
    twelve, five = (record(messages(**many, **{"federation.cohort": n}), tmp_path / str(n)) for n in (12, 5))
    with pytest.raises(SettingsError, match="the cohorts differ by 7 client"):
        compare("differencing", twelve, five)


def test_the_command_takes_two_runs_and_no_more(pair) -> None:
    runner, both = CliRunner(), ["--against", str(pair[0]), "--against", str(pair[1])]
    with runner.isolated_filesystem():
        found = runner.invoke(app, ["attack", "differencing", *both, "--json", "--out", "both"])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["cosine"] > 0.999
        every = runner.invoke(
            app, ["attack", "--against", str(pair[0]), "--observer", "aggregate", "--json", "--out", "one"]
        )
        assert every.exit_code == 0, every.output
        assert "differencing" not in {each["attack"] for each in json.loads(every.stdout)}
        with pytest.raises(SettingsError, match="names 3 runs"):
            runner.invoke(app, ["attack", "differencing", *both, "--against", str(pair[0])], catch_exceptions=False)
