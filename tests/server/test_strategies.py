"""Every strategy, as FedVeil sets it up and over FedVeil's messages, against a few lines of NumPy."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from helpers.support import CLIENTS, EXAMPLES, GLOBAL, LOCAL, LOSSES, SHAPES, experiment, make, play_round

from fedveil import Experiment, SettingsError
from fedveil.algorithms.algorithm import Algorithm
from fedveil.core import catalog
from fedveil.core.declaration import part
from fedveil.core.randomness import Stream, global_random
from fedveil.core.settings.section import Section
from fedveil.core.wire.messages import to_arrays
from fedveil.server.nodes import ClientGrid
from fedveil.server.rounds.sampling import Chance
from fedveil.server.rounds.strategy import Strategy
from fedveil.simulations.engine.grid import InProcessGrid

WEIGHTS = EXAMPLES / EXAMPLES.sum()


def rounds(settings: Experiment, count: int = 1) -> tuple[list[dict[str, np.ndarray]], list[dict]]:
    """The global models after each of `count` rounds, and the configs sent."""
    strategy, model, models, configs = make(settings), GLOBAL, [], []
    for number in range(1, count + 1):
        model, config = play_round(strategy, number, model)
        models.append(model)
        configs.append(config)
    return models, configs


def stack(name: str) -> np.ndarray:
    return np.stack([local[name] for local in LOCAL]).astype(np.float64)


def mean(name: str) -> np.ndarray:
    return np.tensordot(WEIGHTS, stack(name), 1)


def check(models: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(models) == list(SHAPES)
    for name, value in wanted.items():
        np.testing.assert_allclose(models[name], value, rtol=2e-5, atol=2e-6)


def test_fedavg_is_the_mean_by_examples() -> None:
    check(rounds(experiment("fedavg"))[0][0], {name: mean(name) for name in SHAPES})


def test_fedprox_averages_like_fedavg_and_tells_clients_mu() -> None:
    models, configs = rounds(experiment("fedprox"))
    check(models[0], {name: mean(name) for name in SHAPES})
    assert configs[0]["proximal-mu"] == 0.3


def test_fedavgm_moves_by_momentum_of_the_differences() -> None:
    models, _ = rounds(experiment("fedavgm", learning_rate=0.7, momentum=0.8), 2)
    for name in SHAPES:
        step = GLOBAL[name] - mean(name)
        first = GLOBAL[name] - 0.7 * step
        step = 0.8 * step + (first - (mean(name) + 1))
        check(models[0], {name: first}), check(models[1], {name: first - 0.7 * step})


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_strategies_follow_reddi_et_al_and_flowers_bias_correction(strategy: str) -> None:
    eta, b1, b2, tau = 0.2, 0.8, 0.9, 1e-2
    moments = {} if strategy == "fedadagrad" else {"beta_1": b1, "beta_2": b2}
    models, _ = rounds(experiment(strategy, learning_rate=eta, tau=tau, **moments), 2)
    for name in SHAPES:
        x, m, v = GLOBAL[name].astype(np.float64), 0.0, 0.0
        for t in (1, 2):
            delta = mean(name) + (t - 1) - x
            if strategy == "fedadagrad":
                m, v, rate = delta, v + delta**2, eta  # algorithm 2 with beta_1 = 0
            else:
                m = b1 * m + (1 - b1) * delta
                square = delta**2
                v = b2 * v + (1 - b2) * square if strategy == "fedadam" else v - (1 - b2) * square * np.sign(v - square)
                # Flower corrects the bias of Adam's moments (Kingma and Ba 2015), with t+1; Yogi has no correction
                rate = eta * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)) if strategy == "fedadam" else eta
            x = x + rate * m / (np.sqrt(v) + tau)
            check(models[t - 1], {name: x})


def test_qfedavg_weighs_by_the_loss_of_the_global_model() -> None:
    models, configs = rounds(experiment("qfedavg", q=1.5))
    assert configs[0]["report-global-loss"] is True
    q, lipschitz = 1.5, 1 / 0.5
    steps = [{n: lipschitz * (GLOBAL[n].astype(np.float64) - LOCAL[k][n]) for n in SHAPES} for k in range(CLIENTS)]
    norms = [sum((s**2).sum() for s in step.values()) for step in steps]
    h = sum(q * LOSSES[k] ** (q - 1) * norms[k] + lipschitz * LOSSES[k] ** q for k in range(CLIENTS))
    check(models[0], {n: GLOBAL[n] - sum(LOSSES[k] ** q * steps[k][n] for k in range(CLIENTS)) / h for n in SHAPES})


def test_fedmedian_and_trimmed_mean() -> None:
    check(rounds(experiment("fedmedian"))[0][0], {n: np.median(stack(n), axis=0) for n in SHAPES})
    trimmed = {n: np.sort(stack(n), axis=0)[1:-1].mean(axis=0) for n in SHAPES}  # int(0.2 * 9) = 1 off each end
    check(rounds(experiment("fedtrimmedavg"))[0][0], trimmed)


def krum_order(malicious: int) -> list[int]:
    flat = np.concatenate([stack(n).reshape(CLIENTS, -1) for n in SHAPES], axis=1)
    distances = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    nearest = np.sort(distances, axis=1)[:, 1 : CLIENTS - malicious - 1]  # n - f - 2 others
    return np.argsort(nearest.sum(axis=1)).tolist()


def test_krum_and_multikrum_select_by_distance_to_the_nearest() -> None:
    check(rounds(experiment("krum", byzantine_clients=2))[0][0], LOCAL[krum_order(2)[0]])
    chosen = krum_order(2)[:5]  # 9 - 2 - 2
    weights = EXAMPLES[chosen] / EXAMPLES[chosen].sum()
    wanted = {n: np.tensordot(weights, stack(n)[chosen], 1) for n in SHAPES}
    check(rounds(experiment("multikrum", byzantine_clients=2))[0][0], wanted)


def test_bulyan_averages_the_values_nearest_the_median_of_the_selected() -> None:
    models, _ = rounds(experiment("bulyan", byzantine_clients=1))
    chosen = krum_order(1)[: CLIENTS - 2]
    for n in SHAPES:
        values = stack(n)[chosen]
        order = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0)[: len(chosen) - 2]
        check(models[0], {n: np.take_along_axis(values, order, axis=0).mean(axis=0)})


@pytest.mark.parametrize("population", [100, 99, 37, 1000])
def test_the_cohort_is_exact_where_fractions_would_round(population: int) -> None:
    for cohort in (1, 7, 29, population):
        settings = Experiment(data={"clients": population}, federation={"cohort": min(cohort, population)})
        strategy = make(settings)
        messages = strategy.train_messages(1, to_arrays(GLOBAL), {}, numbered(population), Chance(Stream(3, 5)))
        assert len({m.metadata.dst_node_id for m in messages}) == min(cohort, population)


ALL = list(catalog.STRATEGIES)


def numbered(population: int) -> InProcessGrid:
    return InProcessGrid(ClientApp(), population, {})


def settings_for(strategy: str, population: int, cohort: int) -> Experiment:
    return Experiment(
        data={"clients": population, "validation_fraction": 0.5},
        training={"proximal_mu": 0.3},
        federation={"cohort": cohort, "strategy": strategy},
        evaluation={"federated": True, "cohort": cohort + 1},
    )


def drawn(strategy: Strategy, population: int) -> list[list[int]]:
    """The node ids that a strategy sends to, to train and to evaluate, in order."""
    asked = []
    given, stream = (1, to_arrays(GLOBAL), {"learning-rate": 0.5}, numbered(population)), Stream(3, 5)
    for messages in (strategy.train_messages(*given, Chance(stream)), strategy.evaluate_messages(*given, stream)):
        asked.append([m.metadata.dst_node_id for m in messages])
        assert messages[0].content["config"]["server-round"] == 1
        assert len({id(m.content["config"]) for m in messages}) == 1  # what engines compute together shares it
    return asked


def drawn_by_flower(population: int, cohort: int) -> list[list[int]]:
    """The node ids that Flower's own FedAvg draws, with Python's global generator set from the same streams."""
    strategy = FedAvg(cohort / population, (cohort + 1) / population, cohort, cohort + 1, population)
    asked = []
    for configure, purpose in (
        (strategy.configure_train, "sampling"), (strategy.configure_evaluate, "evaluation sampling"),
    ):  # fmt: skip
        with global_random(Stream(3, 5), purpose):
            messages = configure(1, to_arrays(GLOBAL), ConfigRecord({}), numbered(population))
        asked.append([m.metadata.dst_node_id for m in messages])
    return asked


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize(("population", "cohort"), [(12, 9), (12, 11), (5_000, 9)])
def test_the_clients_drawn_are_those_that_flowers_fedavg_draws(strategy: str, population: int, cohort: int) -> None:
    ours = drawn(make(settings_for(strategy, population, cohort)), population)
    assert ours == drawn_by_flower(population, cohort)
    assert [len(set(nodes)) for nodes in ours] == [cohort, cohort + 1]


@pytest.mark.parametrize("strategy", ALL)
def test_drawing_a_cohort_from_a_million_clients_writes_down_the_cohort_alone(strategy: str) -> None:
    made = make(settings_for(strategy, 10**6, 9))
    drawn(made, 10**6)
    tracemalloc.start()
    drawn(made, 10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # bytes; a list of the population takes 8e6 for its places alone


def test_clients_over_flowers_nodes_are_drawn_without_listing_them_too() -> None:
    class OneNode(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return [Message(RecordDict({"metrics": MetricRecord({"client": 0})}), reply_to=m) for m in messages]

    tracemalloc.start()
    grid = ClientGrid(OneNode(ClientApp(), 1, {}), 10**6)
    strategy = make(settings_for("fedavg", 10**6, 9))
    messages = strategy.train_messages(1, to_arrays(GLOBAL), {}, grid, Chance(Stream(3, 5)))
    list(grid.send_and_receive(messages))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(messages) == 9
    assert peak < 2e6


class Scaled(Section):
    factor: float = 0.5


@part(Scaled, why="it takes the first update alone")
def first_scaled(settings: Scaled, _: Experiment) -> Algorithm:
    return Algorithm(rule=lambda cohort: {n: settings.factor * v for n, v in cohort.weights[0].items()})


@pytest.mark.parametrize(("given", "factor"), [({}, 0.5), ({"factor": 0.25}, 0.25)])
def test_an_algorithm_from_outside_the_package_is_one_declared_function(given, factor, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_own_algorithms", sys.modules[__name__])
    models, _ = rounds(experiment("tests_own_algorithms:first_scaled", **given))
    check(models[0], {name: factor * value for name, value in LOCAL[0].items()})
    with pytest.raises(SettingsError, match=r"did you mean 'federation\.strategy\.factor'"):
        experiment("tests_own_algorithms:first_scaled", facter=1.0)
