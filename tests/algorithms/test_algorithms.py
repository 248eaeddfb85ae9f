"""What algorithms promise beside their papers' formulas: no input is changed, and what they declare holds."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest

import fedveil.algorithms
from fedveil import Experiment, SettingsError, TrainingError
from fedveil.algorithms.algorithm import Algorithm, Cohort, Contribution
from fedveil.algorithms.rules.bulyan import bulyan_mean
from fedveil.algorithms.rules.krum import MultiKrum, multikrum
from fedveil.core import catalog
from fedveil.core.declaration import declaration

ALL = {name: catalog.STRATEGIES.load(name, "federation.strategy") for name in catalog.STRATEGIES}
MODEL = {"w": np.float32([[1, 2], [3, 4]]), "b": np.float32([0.5, -0.5])}


def cohort(clients: int = 7) -> Cohort:
    rng = np.random.default_rng(5)
    found = [
        Contribution(
            k,
            {name: value + np.float32(rng.normal(size=value.shape)) for name, value in MODEL.items()},
            k + 1,
            {"global-loss": 0.5},
        )
        for k in range(clients)
    ]
    return Cohort(MODEL, found, 0.1, clients)


@pytest.mark.parametrize("name", ALL)
def test_an_algorithm_changes_neither_the_model_nor_the_updates_nor_its_old_state(name) -> None:
    algorithm: Algorithm = ALL[name](declaration(ALL[name]).settings(), with_liars(0))
    given = cohort()
    held = [given.model, *given.weights]
    before = [{key: value.copy() for key, value in arrays.items()} for arrays in held]
    state, model = algorithm.apply(algorithm.init(MODEL), MODEL, algorithm.rule(given))
    stored = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    algorithm.apply(state, model, algorithm.rule(given))
    for arrays, earlier in zip(held, before, strict=True):
        assert all((arrays[key] == value).all() for key, value in earlier.items())
    assert state.keys() == stored.keys()
    assert all(state[key] == stored[key] or state[key].items() == stored[key].items() for key in stored)


@pytest.mark.parametrize("name", ALL)
def test_an_algorithm_says_what_it_must_see_and_why(name) -> None:
    declared = declaration(ALL[name])
    needs = {
        "fedavg": "sum",
        "fedprox": "sum",
        **dict.fromkeys(("fedavgm", "fedadam", "fedyogi", "fedadagrad"), "mean"),
    }
    assert declared.needs == needs.get(name, "each")
    assert bool(declared.why) == (declared.needs != "sum")


def with_liars(liars: int, cohort: int = 9) -> Experiment:
    return Experiment(data={"clients": 50}, federation={"cohort": cohort, "byzantine_clients": liars})


def test_multikrum_selects_what_the_settings_say_or_as_many_as_there_can_be_of_a_whole_cohort() -> None:
    given, experiment = cohort(9), with_liars(2)
    means = {chosen: multikrum(MultiKrum(selected=chosen), experiment).rule(given) for chosen in (None, 5, 4)}
    assert all((means[None][key] == means[5][key]).all() for key in MODEL)
    assert not all((means[None][key] == means[4][key]).all() for key in MODEL)


def test_bulyan_refuses_a_round_with_too_few_updates() -> None:
    with pytest.raises(TrainingError, match=r"bulyan needs 7 updates against 1 that lie \(4 f \+ 3\), and 6 came"):
        bulyan_mean(cohort(6).weights, 1)


@pytest.mark.parametrize(
    ("name", "federation", "said"),
    [
        ("krum", {"cohort": 8, "byzantine_clients": 3}, "krum with federation.byzantine_clients = 3 needs at least 9"),
        ("multikrum", {"cohort": 4, "byzantine_clients": 1}, "multikrum with .* needs at least 5"),
        (
            {"name": "multikrum", "selected": 6}, {"cohort": 8, "byzantine_clients": 1},
            "federation.strategy.selected = 6: .* at most cohort - byzantine_clients - 2 = 5",
        ),
        ("bulyan", {"cohort": 10, "byzantine_clients": 2}, "bulyan with federation.byzantine_clients = 2 needs at least 11"),
        ("fedprox", {"cohort": 10}, "with training.proximal_mu = 0 it is fedavg"),
    ],
)  # fmt: skip
def test_what_cannot_work_with_the_experiment_is_refused_by_the_part_itself(name, federation, said) -> None:
    mu = 0.3 if name != "fedprox" else 0.0
    with pytest.raises(SettingsError, match=said):
        Experiment(data={"clients": 20}, training={"proximal_mu": mu}, federation={"strategy": name, **federation})
    enough = {"strategy": name, **federation, "cohort": 20}
    Experiment(federation=enough, data={"clients": 20}, training={"proximal_mu": 0.3})


def test_algorithms_know_neither_flower_nor_messages_nor_a_floor_above() -> None:
    folder = Path(str(importlib.import_module("fedveil.algorithms.algorithm").__file__)).parent
    files = list(folder.rglob("*.py"))
    assert len(files) > 8
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                ours = name.startswith(("fedveil.core", "fedveil.algorithms")) and name != "fedveil.core.wire.messages"
                assert ours or not name.startswith(("fedveil", "flwr")), (path.name, name)
    assert fedveil.algorithms.__doc__
