"""A Flower strategy of the user's own, a class or a factory, is a strategy of a round like those that FedVeil has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from helpers.kills import content

from fedveil import Experiment, TrainingError, run
from fedveil.core.errors import Interrupted
from fedveil.simulations.display import Display

SMALL = {
    "data.clients": 8, "data.validation_fraction": 0.2, "evaluation.federated": True, "model.hidden": [8],
    "training.epochs": 1, "federation.cohort": 5, "federation.rounds": 3,
}  # fmt: skip


def small(strategy: str, **settings: Any) -> Experiment:
    return Experiment.preset("digits").override({**SMALL, **settings, "federation.strategy": strategy})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_own_strategies", sys.modules[__name__])


def adam(experiment: Experiment, shared: dict[str, Any]) -> Strategy:
    return FedAdam(**shared, eta=0.1)


class Made:
    """A class that is a factory: it is called as one."""

    def __new__(cls, experiment: Experiment, shared: dict[str, Any]) -> Strategy:  # type: ignore[misc]
        return adam(experiment, shared)


class OneClassTwoArguments(FedAdam):
    """A strategy whose class takes what a factory takes."""

    def __init__(self, experiment: Experiment, shared: dict[str, Any]) -> None:
        super().__init__(**shared, eta=0.1)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fedavg", "flwr.serverapp.strategy:FedAvg"),
        ("fedmedian", "flwr.serverapp.strategy:FedMedian"),
        ("fedtrimmedavg", "flwr.serverapp.strategy:FedTrimmedAvg"),
        ("krum", "flwr.serverapp.strategy:Krum"),
        ("bulyan", "flwr.serverapp.strategy:Bulyan"),
        ("fedadam", "tests_own_strategies:adam"),
        ("fedadam", "tests_own_strategies:Made"),
        ("fedadam", "tests_own_strategies:OneClassTwoArguments"),
    ],
)
def test_flowers_own_strategy_makes_the_bytes_of_ours(name: str, own: str, tmp_path: Path) -> None:
    ours, flowers = (run(small(s), out=tmp_path / str(i), plots=False) for i, s in enumerate((name, own)))
    assert content(ours.run_dir) == content(flowers.run_dir)


def test_a_flower_strategy_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    class Stopped(Display):
        def round_done(self, row: Any, state: Any) -> None:
            if state.round == 2:
                raise Interrupted("stopped")

    experiment = small("tests_own_strategies:adam")
    whole = run(experiment, out=tmp_path / "whole", plots=False)
    with pytest.raises(Interrupted):
        run(experiment, out=tmp_path / "cut", plots=False, display=Stopped(None))
    run(experiment, resume=tmp_path / "cut", plots=False)
    assert content(tmp_path / "cut") == content(whole.run_dir)


class Refusing(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return None, None


def test_a_flower_strategy_that_makes_no_model_ends_the_run_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"round 1: tests_own_strategies:Refusing made no model of 5 replies"):
        run(small("tests_own_strategies:Refusing"), out=tmp_path / "run", plots=False)


class Inconsistent(FedAvg):
    """Flower refuses replies that lack the weight it is told to use."""

    def __init__(self, **shared: Any) -> None:
        super().__init__(**{**shared, "weighted_by_key": "nothing"})


def test_what_flower_refuses_to_aggregate_is_said_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"round 1: tests_own_strategies:Inconsistent cannot aggregate: "):
        run(small("tests_own_strategies:Inconsistent"), out=tmp_path / "run", plots=False)
