"""A Flower strategy of a user's own, in whatever form it comes; what cannot work is refused before a record is made."""

from __future__ import annotations

import logging
import sys
import threading
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ArrayRecord, MetricRecord
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg, Strategy
from helpers.kills import content

from fedveil import Experiment, SettingsError, TrainingError, run
from fedveil.core.errors import Interrupted
from fedveil.simulations.display import Display

SMALL = {
    "data.clients": 8, "data.validation_fraction": 0.2, "evaluation.federated": True, "model.hidden": [8],
    "training.epochs": 1, "federation.cohort": 5, "federation.rounds": 3, "engine": "batched", "workers": 1,
}  # fmt: skip


def small(strategy: str, **settings: Any) -> Experiment:
    name = strategy if strategy == "fedavg" else f"tests_own_strategies:{strategy}"
    return Experiment.preset("digits").override({**SMALL, **settings, "federation.strategy": name})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_own_strategies", sys.modules[__name__])


class Plain(FedAvg):
    """A class that takes what FedAvg takes."""


class Bare(FedAvg):
    """A class that takes nothing."""

    def __init__(self) -> None:
        super().__init__()


class Some(FedAvg):
    """A class that takes some of the arguments, and one more that has a default."""

    def __init__(self, fraction_train: float = 1.0, min_train_nodes: int = 2, strength: float = 1.0) -> None:
        super().__init__(fraction_train=fraction_train, min_train_nodes=min_train_nodes)
        self.strength = strength


instance = FedAvg()
finished = partial(FedAvg, weighted_by_key="num-examples")


def zero() -> Strategy:
    return FedAvg()


def one(experiment: Experiment) -> Strategy:
    return FedAvg(min_available_nodes=experiment.data.clients)


def two(settings: Experiment, arguments: dict[str, Any]) -> Strategy:
    return FedAvg(**arguments)


def keywords(**arguments: Any) -> Strategy:
    return FedAvg(**arguments)


def optional(learning_rate: float = 0.5) -> Strategy:
    return FedAvg()


FORMS = ["Plain", "Bare", "Some", "instance", "finished", "zero", "one", "two", "keywords", "optional"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(run(small("fedavg"), out=tmp_path_factory.mktemp("ours") / "run", plots=False).run_dir)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_strategy_makes_the_bytes_of_fedavg(form: str, ours: dict[str, bytes], tmp_path: Path) -> None:
    assert content(run(small(form), out=tmp_path / "run", plots=False).run_dir) == ours
    assert instance.min_train_nodes == 2  # the user's own is left alone


def spread(contents: Any, weighted_by_key: str) -> MetricRecord:
    sizes = [content["metrics"]["num-examples"] for content in contents]
    return MetricRecord({"size-spread": max(sizes) - min(sizes), "sizes": sorted(sizes), "train-loss": -1.0})


def fairness(contents: Any, weighted_by_key: str) -> MetricRecord:
    return MetricRecord(
        {"clients-seen": len(contents), "validation_worst": max(c["metrics"]["loss"] for c in contents)}
    )


class Telling(FedAvg):
    """Tells metrics of its own, and keeps what a checkpoint must bring back."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "train_metrics_aggr_fn": spread, "evaluate_metrics_aggr_fn": fairness})
        self.by_round: dict[int, Any] = {}
        self.seen: defaultdict[int, list[int]] = defaultdict(list)
        self.log = logging.getLogger("mine")  # stays as it is made, so no checkpoint needs to hold it

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        self.by_round[server_round] = (len(replies), {"nodes": np.arange(server_round), "worst": float("nan")})
        self.seen[server_round % 2].append(server_round)
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["rounds"] = sum(len(kept) for kept in self.seen.values())
        assert sorted(self.by_round) == list(range(1, server_round + 1))
        assert self.by_round[1][1]["nodes"].tolist() == [0]
        return arrays, metrics


def test_metrics_that_a_strategy_aggregates_are_columns_of_metrics_csv(tmp_path: Path) -> None:
    experiment = small("Telling", **{"evaluation.every": 2, "federation.rounds": 4})
    result = run(experiment, out=tmp_path / "run", plots=False)
    table, clients = pd.read_csv(tmp_path / "run" / "metrics.csv"), result.clients
    trained = clients[clients.stage == "train"].groupby("round").examples
    assert table.train_size_spread.tolist()[1:] == (trained.max() - trained.min()).tolist()
    assert table.train_sizes[1] == " ".join(
        map(str, sorted(clients[(clients.stage == "train") & (clients["round"] == 1)].examples))
    )
    assert table.train_rounds.tolist()[1:] == [1, 2, 3, 4]
    assert (table.train_loss[1:] > 0).all()  # FedVeil's own column is not a strategy's to change
    assert table.validation_clients_seen.fillna(0).tolist() == [0, 0, 5, 0, 5]
    assert table.validation_worst.notna().tolist() == [False, False, True, False, True]
    assert np.isnan(table.train_size_spread[0])
    assert list(table.columns)[:6] == ["round", "learning_rate", "clients", "failures", "train_loss", "test_loss"]
    assert (table.validation_accuracy.notna() == table.validation_worst.notna()).all()
    assert not list((tmp_path / "run").glob(".*"))


def test_a_strategy_with_metrics_and_state_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    class Stopped(Display):
        def round_done(self, row: Any, state: Any) -> None:
            if state.round == 1:
                raise Interrupted("stopped")

    experiment = small("Telling", **{"evaluation.every": 2})
    whole = run(experiment, out=tmp_path / "whole", plots=False)
    with pytest.raises(Interrupted):
        run(experiment, out=tmp_path / "cut", plots=False, display=Stopped(None))
    run(experiment, resume=tmp_path / "cut", plots=False)
    assert content(tmp_path / "cut") == content(whole.run_dir)


def wrapped(experiment: Experiment, arguments: dict[str, Any]) -> Strategy:
    inner = FedAdam(**arguments, eta=0.1)
    return DifferentialPrivacyServerSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=5
    )


def adam(experiment: Experiment, arguments: dict[str, Any]) -> Strategy:
    return FedAdam(**arguments, eta=0.1)


def test_a_strategy_around_another_works_and_keeps_what_the_inner_one_keeps(tmp_path: Path) -> None:
    class Stopped(Display):
        def round_done(self, row: Any, state: Any) -> None:
            if state.round == 2:
                raise Interrupted("stopped")

    whole = run(small("wrapped"), out=tmp_path / "whole", plots=False)
    with pytest.raises(Interrupted):
        run(small("wrapped"), out=tmp_path / "cut", plots=False, display=Stopped(None))
    run(small("wrapped"), resume=tmp_path / "cut", plots=False)
    assert content(tmp_path / "cut") == content(whole.run_dir)
    alone = run(small("adam"), out=tmp_path / "alone", plots=False)
    np.testing.assert_allclose(whole.metrics.test_loss, alone.metrics.test_loss, rtol=1e-4)


class Half(FedAvg):
    """Says by itself how many clients it asks."""

    def __init__(self) -> None:
        super().__init__(fraction_train=0.5, fraction_evaluate=0.25)


def test_a_strategy_that_asks_others_than_the_cohort_says_so(tmp_path: Path) -> None:
    said: list[str] = []

    class Warned(Display):
        def warn(self, text: str) -> None:
            said.append(text)

    result = run(small("Half"), out=tmp_path / "run", plots=False, display=Warned(None))
    assert result.metrics.clients.tolist()[1:] == [4, 4, 4]
    assert said == ["round 1: tests_own_strategies:Half asks 4 clients, and federation.cohort = 5"]


class Wrong(FedAvg):
    def __init__(self, strength: float) -> None:
        super().__init__()


class Locked(FedAvg):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lock = threading.Lock()


class Abstract(Strategy):
    pass


def raising(experiment: Experiment) -> Strategy:
    return FedAvg(**experiment)  # type: ignore[arg-type]


def nothing() -> None:
    return None


def three(experiment: Any, arguments: Any, more: Any) -> Strategy:
    return FedAvg()


def older(experiment: Experiment) -> Any:
    return OlderFedAvg()


def waiting() -> Strategy:
    return FedAvg(min_available_nodes=100)


number = 5


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("Wrong", r"Wrong': takes 'strength', which FedVeil does not have; give it a default"),
        ("Locked", r"Locked.lock is a lock, which no checkpoint can hold"),
        ("Abstract", r"cannot be made: TypeError: .*abstract"),
        ("raising", r"cannot be made: TypeError: .*must be a mapping.*test_own_strategies.py, line \d+\)"),
        ("nothing", r"nothing': is a NoneType, and must be a strategy of Flower's"),
        ("three", r"three': takes 'more'"),
        ("older", r"is of Flower's older interface, flwr.server.strategy; take the class of that name"),
        ("waiting", r"waits for 100 clients \(min_available_nodes = 100\), and data.clients = 8"),
        ("number", r"number': is a int, and must be a strategy"),
    ],
)
def test_what_cannot_work_is_refused_before_a_record_is_made(form: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        run(small(form), out=tmp_path / "run", plots=False)
    assert list(tmp_path.iterdir()) == []


class Failing(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return ArrayRecord([]), {"loss": next(iter(replies)).content["metrics"]["not there"]}


class Elsewhere(FedAvg):
    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        messages[0].metadata.dst_node_id = 99
        return messages


class Renamed(FedAvg):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "arrayrecord_key": "weights"})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (
            "Failing",
            r"round 1: .*Failing.aggregate_train failed: KeyError: 'not there' \(.*test_own_strategies.py, line \d+\)",
        ),
        ("Elsewhere", r"round 1: .*what configure_train returns addresses node 99"),
        ("Renamed", r"round 1: .*what configure_train returns holds a message without 'arrays'"),
    ],
)
def test_what_fails_in_a_strategys_code_ends_the_run_with_its_line(form: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=said):
        run(small(form), out=tmp_path / "run", plots=False)
