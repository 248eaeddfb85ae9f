"""`label_dirichlet` is flwr-datasets' DirichletPartitioner: held to a plain telling of its documented algorithm, draw by draw."""

from __future__ import annotations

import numpy as np
import pytest

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Data
from fedveil.datasets.partition.division import divide


def plain(labels: list[int], clients: int, alpha: float, balanced: bool, least: int, rng: np.random.Generator):
    """The examples of each client, one example and one client after another."""
    for _ in range(11):
        held: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            rows = [i for i, each in enumerate(labels) if each == label]
            shares = list(rng.dirichlet([alpha] * clients))
            for client in range(clients):
                if balanced and len(held[client]) > len(labels) / clients:
                    shares[client] = 0.0
            cuts, upto = [0], 0.0
            for share in shares:
                upto += share
                cuts.append(upto)
            cuts = [int(cut / upto * len(rows)) for cut in cuts]
            for client in range(clients):
                held[client] += rows[cuts[client] : cuts[client + 1]]
        if min(map(len, held)) >= least:
            break
    return held


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_goes_where_the_plain_algorithm_puts_it(alpha, balanced, seed) -> None:
    labels = np.random.default_rng(seed).integers(0, 7, 900)
    settings = {"name": "label_dirichlet", "alpha": alpha, "self_balancing": balanced}
    found = divide(labels, None, (), Data(clients=12, partition=settings, min_examples=1), seed)
    wanted = plain(labels.tolist(), 12, alpha, balanced, 1, Stream(seed).generator("partition"))
    assert [sorted(found.indices(k).tolist()) for k in range(12)] == [sorted(rows) for rows in wanted]


def entropies(name: str, alpha: float) -> tuple[float, float]:
    """The mean entropy of the clients' label mixes in nats, and the largest client by the mean; 100 clients, balanced classes."""
    labels, means, largest = np.arange(20_000) % 10, [], []
    for seed in range(3):
        division = divide(labels, None, (), Data(clients=100, partition={"name": name, "alpha": alpha}), seed)
        mixes = division.counts(labels, 10) / division.sizes()[:, None]
        means.append(-np.sum(mixes * np.log(np.where(mixes > 0, mixes, 1)), axis=1).mean())
        largest.append(division.sizes().max() / division.sizes().mean())
    return float(np.mean(means)), float(np.mean(largest))


def test_it_differs_from_dirichlet_as_the_documentation_says() -> None:
    """docs/data.md: sizes are skewed, and the same alpha is another skew of the labels."""
    theirs, ours = entropies("label_dirichlet", 0.5), entropies("dirichlet", 5.0)
    assert theirs[1] > 1.5
    assert ours[1] < 1.01
    assert theirs[0] < ours[0]


@pytest.mark.parametrize("alpha", [5e-324, 1e-300])
def test_so_small_an_alpha_that_nothing_is_left_to_share_out_still_divides_everything(alpha) -> None:
    labels = np.arange(60) % 6
    settings = {"name": "label_dirichlet", "alpha": alpha}
    division = divide(labels, None, (), Data(clients=3, partition=settings, min_examples=1), 0)
    assert division.sizes().sum() == 60
