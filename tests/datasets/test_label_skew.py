"""Dirichlet label mixes and balanced classes are distributed as their definitions say, and never fail to end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from fedveil.core.settings.sections import Data
from fedveil.datasets.partition import label_skew
from fedveil.datasets.partition.dirichlet import Dirichlet, dirichlet
from fedveil.datasets.partition.division import Pool, divide


def spied(patch: pytest.MonkeyPatch) -> list[tuple]:
    """What each pass over the clients was given."""
    passes: list[tuple] = []
    draw = label_skew._draw
    patch.setattr(label_skew, "_draw", lambda *given: passes.append(given) or draw(*given))
    return passes


def plain_dirichlet(labels, sizes, alpha, rng):
    """The definition, a client at a time: q ~ Dir(alpha * p), then labels by q."""
    p = np.bincount(labels) / len(labels)
    return np.array([rng.multinomial(size, rng.dirichlet(alpha * p)) for size in sizes])


@pytest.mark.parametrize("alpha", [0.3, 2.0, 30.0])
def test_dirichlet_mixes_are_distributed_as_the_plain_definition(alpha):
    """First and second moments of a client's label counts, where no class runs out: a urn against rng.dirichlet."""
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    clients, size = 4000, 10
    plain = plain_dirichlet(labels, [size] * clients, alpha, np.random.default_rng(0))
    client = np.repeat(np.arange(clients), size)
    drawn = label_skew._draw(
        client, np.full(len(client), -1), np.array([0.6, 0.3, 0.1]), alpha, np.random.default_rng(1)
    )
    urn = np.bincount(client * 3 + drawn, minlength=3 * clients).reshape(clients, 3)
    for c in range(3):
        table = np.array([np.bincount(plain[:, c], minlength=size + 1), np.bincount(urn[:, c], minlength=size + 1)])
        assert stats.chi2_contingency(table[:, table.sum(axis=0) > 10]).pvalue > 1e-4
    theory = size * 0.6 * 0.4 * (size + alpha) / (1 + alpha)  # variance of a Dirichlet-multinomial
    assert urn[:, 0].var() == pytest.approx(theory, rel=0.1)


def plain_fill(labels, clients, size, alpha, rng):
    """The passes with every mix written down and every contested class shared out one draw at a time."""
    left = np.bincount(labels)
    mixes = rng.dirichlet(alpha * left / len(labels), clients)
    held = np.zeros((clients, len(left)), int)
    while held.sum() < len(labels):
        mix = mixes * (left > 0)
        mix /= mix.sum(axis=1, keepdims=True)
        wanted = np.array([rng.multinomial(size - held[k].sum(), mix[k]) for k in range(clients)])
        for c in np.flatnonzero(left):
            draws = rng.permutation(np.repeat(np.arange(clients), wanted[:, c]))[: left[c]]
            held[:, c] += np.bincount(draws, minlength=clients)
        left = np.bincount(labels) - held.sum(axis=0)
    return held


def test_dirichlet_goes_on_with_the_mix_a_client_began_with(monkeypatch):
    """In every pass, a client that still needs examples draws given all it holds of the classes that are left."""
    passes = spied(monkeypatch)
    labels = np.arange(600) % 10
    rng = np.random.default_rng(0)
    counts = dirichlet(Pool(labels, 20), Dirichlet(alpha=1.0), rng).counts(labels, 10)
    assert len(passes) > 2
    for client, label, prior, *_ in passes:
        for k in np.unique(client):
            mine = label[client == k]
            assert sorted(mine < 0) == (mine < 0).tolist()  # the filled places come first
            assert (prior[mine[mine >= 0]] > 0).all()
            assert len(mine) == 30 - counts[k, prior == 0].sum()


def test_dirichlet_fills_contested_classes_as_the_plain_passes_do():
    """How concentrated the clients end, on average, and that the first client fares no better than the last."""
    labels = np.arange(300) % 5
    settings, clients, runs = Dirichlet(alpha=2.0), 10, 400

    def concentration(held):  # sum of squared shares of each client
        return ((held / 30.0) ** 2).sum(axis=1)

    plain = [concentration(plain_fill(labels, clients, 30, 2.0, np.random.default_rng(i))) for i in range(runs)]
    ours = [
        concentration(dirichlet(Pool(labels, clients), settings, np.random.default_rng(i)).counts(labels, 5))
        for i in range(runs)
    ]
    assert stats.ttest_ind(np.mean(plain, axis=1), np.mean(ours, axis=1)).pvalue > 1e-4
    first, last = np.array(ours)[:, :5].mean(axis=1), np.array(ours)[:, 5:].mean(axis=1)
    assert stats.ttest_rel(first, last).pvalue > 1e-4


def test_dirichlet_draws_after_a_class_ran_out_follow_the_rest_of_the_mix():
    """Given 3 places filled with class 1, the next follows the posterior Dir(alpha * p + counts) without class 0."""
    clients, alpha = 20_000, 2.0
    client = np.repeat(np.arange(clients), 4)
    label = np.tile([1, 1, 1, -1], clients)
    prior = np.array([0.0, 0.25, 0.25])  # of (0.5, 0.25, 0.25): class 0 ran out
    drawn = label_skew._draw(client, label, prior, alpha, np.random.default_rng(0))[3::4]
    share = (alpha * 0.25 + 3) / (alpha * 0.5 + 3)
    assert (drawn == 1).mean() == pytest.approx(share, abs=5 * (share * (1 - share) / clients) ** 0.5)


@given(st.integers(1, 60), st.integers(1, 200), st.floats(1e-3, 1e3))
def test_dirichlet_sizes_differ_by_at_most_one(clients, n, alpha):
    if clients <= n:
        labels = np.arange(n) % 7
        data = Data(clients=clients, partition={"name": "dirichlet", "alpha": alpha})
        sizes = divide(labels, None, (), data, 0).sizes()
        assert sizes.max() - sizes.min() <= 1


def test_dirichlet_is_iid_for_large_alpha_and_one_class_a_client_for_small():
    labels = np.arange(10_000) % 10
    mixes = {}
    for alpha in (1e-6, 1e6):
        data = Data(clients=10, partition={"name": "dirichlet", "alpha": alpha})
        mixes[alpha] = divide(labels, None, (), data, 0).counts(labels, 10)
    assert abs(mixes[1e6] - 100).max() < 60
    # The first to draw a class empties it; a client holds whole classes and what is left over.
    assert (mixes[1e-6] == 1000).sum() >= 5


def test_dirichlet_gives_no_client_a_class_that_is_used_up(monkeypatch):
    """One class has one example: only one client can hold it, and everybody is filled in at most as many passes as classes."""
    calls = spied(monkeypatch)
    labels = np.array([0] + [1] * 500 + [2] * 499)
    partition = divide(labels, None, (), Data(clients=100, partition={"name": "dirichlet", "alpha": 0.01}), 3)
    assert partition.sizes().tolist() == [10] * 100
    assert 1 <= len(calls) <= 3


@given(npst.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 12)), st.data(), st.floats(1e-3, 1e3))
def test_dirichlet_needs_no_more_passes_than_classes(labels, given_data, alpha):
    clients = given_data.draw(st.integers(1, len(labels)))
    with pytest.MonkeyPatch.context() as patch:
        passes = spied(patch)
        dirichlet(Pool(labels, clients), Dirichlet(alpha=alpha), np.random.default_rng(0))
    assert len(passes) <= len(np.unique(labels))


def test_every_pair_of_classes_is_held_about_equally_often():
    held = label_skew.balanced_owners(45_000, 2, 10, np.random.default_rng(0))
    pairs = np.bincount(held.min(axis=1) * 10 + held.max(axis=1), minlength=100)
    pairs = pairs[pairs > 0]
    assert len(pairs) == 45
    # Each is near Binomial(45000, 1/45): mean 1000, standard deviation 31.
    assert abs(pairs - 1000).max() < 5 * 31
