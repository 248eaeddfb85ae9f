"""Each algorithm gives the bytes of Flower's own strategy, over several rounds and any updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import Experiment
from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort, Contribution
from fedveil.algorithms.fedavg import fedavg
from fedveil.algorithms.fedavgm import FedAvgM, fedavgm
from fedveil.algorithms.fedopt import FedAdagrad, FedAdam, fedadagrad, fedadam, fedyogi
from fedveil.algorithms.fedprox import fedprox
from fedveil.algorithms.qfedavg import QFedAvg, qfedavg
from fedveil.algorithms.rules.bulyan import bulyan
from fedveil.algorithms.rules.krum import MultiKrum, krum, multikrum
from fedveil.algorithms.rules.median import fedmedian
from fedveil.algorithms.rules.trimmed_mean import TrimmedMean, fedtrimmedavg
from fedveil.core.settings.section import NoSettings
from fedveil.simulations.engine.grid import InProcessGrid

SHAPES: dict[str, tuple[int, ...]] = {"weight": (5, 4), "bias": (5,), "scale": ()}
ROUNDS = 3
eighths = st.integers(0, 7).map(lambda n: n / 8)
rates = st.sampled_from([0.01, 0.1, 0.3, 1.0, 3.0])

PLAIN = Experiment()


@pytest.fixture(scope="module", autouse=True)
def quick_flower() -> Iterator[None]:
    """Flower collects garbage for every array that q-FedAvg and Bulyan read, and logs every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        patch.setattr(logging.getLogger("flwr"), "disabled", True)
        yield


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Numbers of any size, many of them zeros of either sign, and all alike now and then."""
    scale = 10.0 ** rng.integers(-4, 5)
    made = {}
    for name, shape in SHAPES.items():
        value = rng.normal(size=shape) * scale * rng.choice([0.0, -0.0, 1.0, 1.0], size=shape)
        made[name] = np.asarray(value, np.float32)
    return made


def cohorts(rng: np.random.Generator, clients: int, rate: float) -> list[tuple[list[Contribution], float]]:
    """The updates of some rounds, and the clients' learning rate in each; some clients send what another sent."""
    rounds = []
    for number in range(ROUNDS):
        updates = [weights(rng) for _ in range(clients)]
        if rng.random() < 0.5:
            updates[-1] = updates[0]
        rounds.append((
            [
                Contribution(client, own, examples := int(rng.integers(1, 10**5)), {
                    "client": client, "num-examples": examples, "global-loss": float(rng.exponential()),
                })
                for client, own in enumerate(updates)
            ],
            rate / (number + 1),
        ))  # fmt: skip
    return rounds


def arrays(values: Arrays) -> ArrayRecord:
    """Flower's own record, which holds copies."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def by_flower(
    strategy: flower.FedAvg, number: int, model: Arrays, cohort: list[Contribution], rate: float
) -> dict[str, np.ndarray]:
    """What a strategy of Flower's makes of a round."""
    if isinstance(strategy, flower.QFedAvg):
        strategy.client_learning_rate = rate
    grid = InProcessGrid(ClientApp(), len(cohort), {})
    messages = sorted(
        strategy.configure_train(number, arrays(model), ConfigRecord({}), grid), key=lambda m: m.metadata.dst_node_id
    )
    replies = [
        Message(
            RecordDict({"arrays": arrays(one.weights), "metrics": MetricRecord(dict(one.metrics))}), reply_to=message
        )
        for message, one in zip(messages, cohort, strict=True)
    ]
    made, _ = strategy.aggregate_train(number, replies)
    assert made is not None
    return {name: array.numpy() for name, array in made.items()}


def assert_alike(
    algorithm: Algorithm, strategy: Callable[..., flower.FedAvg], seed: int, clients: int, rate: float
) -> None:
    """Play rounds with both, each from the float32 model that the round before made."""
    rng = np.random.default_rng(seed)
    model, state = weights(rng), None
    theirs = strategy(
        fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients, weighted_by_key="num-examples"
    )
    with np.errstate(all="ignore"):
        for number, (cohort, local_rate) in enumerate(cohorts(rng, clients, rate), 1):
            wanted = by_flower(theirs, number, model, cohort, local_rate)
            state = algorithm.init(model) if state is None else state
            aggregate = algorithm.rule(Cohort(model, cohort, local_rate, clients))
            state, made = algorithm.apply(state, model, aggregate)
            assert list(made) == list(wanted)
            for name, value in wanted.items():
                ours = np.asarray(made[name])
                assert (ours.dtype, ours.shape, ours.tobytes()) == (value.dtype, value.shape, value.tobytes()), name
            model = {name: np.array(value, np.float32) for name, value in wanted.items()}


def against(liars: int) -> Experiment:
    return Experiment(federation={"byzantine_clients": liars})


def with_options(strategy: type[flower.FedAvg], **options: Any) -> Callable[..., flower.FedAvg]:
    return lambda **shared: strategy(**shared, **options)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_fedavg_and_fedprox(seed, clients) -> None:
    assert_alike(fedavg(NoSettings(), PLAIN), flower.FedAvg, seed, clients, 0.1)
    ours = fedprox(NoSettings(), Experiment(training={"proximal_mu": 0.3}))
    assert_alike(ours, with_options(flower.FedProx, proximal_mu=0.3), seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), rates, eighths)
def test_fedavgm(seed, clients, eta, beta) -> None:
    ours = fedavgm(FedAvgM(learning_rate=eta, momentum=beta), PLAIN)
    theirs = with_options(flower.FedAvgM, server_learning_rate=eta, server_momentum=beta)
    assert_alike(ours, theirs, seed, clients, 0.1)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(fedadam, flower.FedAdam), (fedyogi, flower.FedYogi)], ids=["fedadam", "fedyogi"]
)
@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), rates, eighths, eighths, st.sampled_from([1e-6, 1e-3, 1.0]))
def test_fedadam_and_fedyogi(ours, theirs, seed, clients, eta, beta_1, beta_2, tau) -> None:
    algorithm = ours(FedAdam(learning_rate=eta, beta_1=beta_1, beta_2=beta_2, tau=tau), PLAIN)
    same = with_options(theirs, eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
    assert_alike(algorithm, same, seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), rates, st.sampled_from([1e-6, 1e-3, 1.0]))
def test_fedadagrad(seed, clients, eta, tau) -> None:
    algorithm = fedadagrad(FedAdagrad(learning_rate=eta, tau=tau), PLAIN)
    assert_alike(algorithm, with_options(flower.FedAdagrad, eta=eta, tau=tau), seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), rates, st.sampled_from([0.0, 0.1, 1.0, 2.5]))
def test_qfedavg(seed, clients, rate, q) -> None:
    theirs = with_options(flower.QFedAvg, client_learning_rate=rate, q=q, train_loss_key="global-loss")
    assert_alike(qfedavg(QFedAvg(q=q), PLAIN), theirs, seed, clients, rate)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_fedmedian(seed, clients) -> None:
    assert_alike(fedmedian(NoSettings(), PLAIN), flower.FedMedian, seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.4, 0.49]))
def test_fedtrimmedavg(seed, clients, fraction) -> None:
    algorithm = fedtrimmedavg(TrimmedMean(fraction=fraction), PLAIN)
    assert_alike(algorithm, with_options(flower.FedTrimmedAvg, beta=fraction), seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 3), st.integers(1, 5))
def test_krum_and_multikrum(seed, clients, liars, selected) -> None:
    theirs = with_options(flower.Krum, num_malicious_nodes=liars)
    assert_alike(krum(NoSettings(), against(liars)), theirs, seed, clients, 0.1)
    theirs = with_options(flower.MultiKrum, num_malicious_nodes=liars, num_nodes_to_select=selected)
    assert_alike(multikrum(MultiKrum(selected=selected), against(liars)), theirs, seed, clients, 0.1)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 4))
def test_bulyan(seed, liars, more) -> None:
    theirs = with_options(flower.Bulyan, num_malicious_nodes=liars)
    assert_alike(bulyan(NoSettings(), against(liars)), theirs, seed, 4 * liars + 3 + more, 0.1)
