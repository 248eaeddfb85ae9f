"""The sparse graph: regular, symmetric, connected, and with as many neighbours as its guarantees take."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from fedveil.core.errors import SettingsError
from fedveil.privacy.secagg import graph
from fedveil.privacy.secagg.graph import choose_degree, neighbours

# (clients, colluders, drop-outs): degree, threshold; google-parfait/federated-compute,
# fcp/secagg/server/graph_parameter_finder_test.cc: the analysis of Bell et al. 2020, honest-but-curious server, 2^-40, 2^-20
PUBLISHED = {
    (100, 0.45, 0.45): (92, 46),
    (1000, 0.45, 0.45): (822, 417),
    (10000, 0.45, 0.45): (3494, 1771),
    (10, 0.33, 0.33): (8, 4),
    (100, 0.33, 0.33): (68, 34),
    (1000, 0.33, 0.33): (286, 150),
    (10000, 0.33, 0.33): (422, 221),
    (100000, 0.33, 0.33): (480, 251),
    (1000, 0.33, 0.05): (78, 60),
    (10000, 0.33, 0.05): (92, 70),
}


def connected(links: dict[int, tuple[int, ...]], among: set[int]) -> bool:
    if not among:
        return True
    seen, todo = set(), [min(among)]
    while todo:
        client = todo.pop()
        if client not in seen:
            seen.add(client)
            todo += [other for other in links[client] if other in among]
    return seen == among


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 2**63), min_size=3, max_size=60), st.data())
def test_the_graph_is_regular_symmetric_and_connected(clients: set[int], data: st.DataObject) -> None:
    n = len(clients)
    degree = data.draw(st.one_of(st.just(n - 1), st.integers(1, max(1, (n - 2) // 2)).map(lambda half: 2 * half)))
    links = neighbours(sorted(clients), degree)
    assert links.keys() == clients
    for client, others in links.items():
        assert len(set(others)) == len(others) == min(degree, n - 1)
        assert client not in others
        assert list(others) == sorted(others)
        assert all(client in links[other] for other in others)
    assert connected(links, clients)


def test_a_sparse_graph_is_a_new_one_each_time() -> None:
    assert neighbours(range(50), 4) != neighbours(range(50), 4)


@pytest.mark.parametrize(("population", "marked", "drawn"), [(99, 30, 60), (999, 300, 214), (40, 0, 10), (12, 12, 5)])
def test_tails_are_exact(population: int, marked: int, drawn: int) -> None:
    table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, population + 1)))])
    for least in range(drawn + 2):
        ways = sum(comb(marked, x) * comb(population - marked, drawn - x) for x in range(least, drawn + 1))
        exact = float(Fraction(ways, comb(population, drawn)))
        ours = graph._tail(table, least, population, marked, drawn)
        assert ours == pytest.approx(exact, rel=1e-9, abs=1e-300)
        assert ours == pytest.approx(hypergeom.sf(least - 1, population, marked, drawn), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("case", PUBLISHED)
def test_degrees_agree_with_published_ones(case: tuple[int, float, float]) -> None:
    # ours are a little smaller: a client counts among its own neighbourhood, and is not its own neighbour
    n, colluders, drop_outs = case
    degree, threshold = choose_degree(n, drop_outs, colluders)
    assert 0.96 * PUBLISHED[case][0] <= degree <= PUBLISHED[case][0]
    assert abs(threshold - PUBLISHED[case][1]) <= max(1, 0.02 * PUBLISHED[case][1])


@pytest.mark.parametrize(("drop_outs", "colluders"), [(0.3, 0.2), (0.1, 0.4), (0.4, 0.4)])
def test_the_chances_that_were_asked_for_hold_in_random_graphs(drop_outs: float, colluders: float) -> None:
    n, trials, rng = 60, 1500, random.Random(1)
    degree, threshold = choose_degree(n, drop_outs, colluders, insecure=0.02, failing=0.02)
    assert degree < n - 1

    def chances(degree: int, threshold: int) -> tuple[float, float]:
        insecure = failed = 0
        links = neighbours(range(n), degree)
        for _ in range(trials):
            bad = set(rng.sample(range(n), int(n * colluders)))
            gone = set(rng.sample(range(n), int(n * drop_outs)))
            honest = set(range(n)) - bad
            surrounded = any(len(bad & set(links[client])) >= threshold for client in honest)
            insecure += surrounded or not connected(links, honest - gone)
            failed += any(len({client, *links[client]} - gone) < threshold for client in range(n))
        return insecure / trials, failed / trials

    insecure, failed = chances(degree, threshold)
    assert insecure <= 0.04  # twice what was asked for: over six standard deviations
    assert failed <= 0.04
    sparser = max(2, degree // 2)
    assert max(chances(sparser, sparser // 2 + 1)) > 0.04  # the trial can tell


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 300), st.floats(0, 0.45), st.floats(0, 0.45))
def test_a_choice_keeps_its_promises_or_is_refused(n: int, drop_outs: float, colluders: float) -> None:
    gone, bad = int(n * drop_outs + 1e-9), int(n * colluders + 1e-9)
    for active in (False, True):
        try:
            degree, threshold = choose_degree(n, drop_outs, colluders, active)
        except SettingsError:
            assert 2 * (n - gone) <= n + (bad if active else 0) or n - gone <= bad
            continue
        assert 2 <= threshold <= degree + 1
        assert 2 * threshold > degree + 1
        assert degree == n - 1 or (degree % 2 == 0 and not active)
        if degree == n - 1:
            assert bad < threshold <= n - gone
        if active:
            assert 2 * threshold > n + bad


def test_degrees_grow_with_the_logarithm_of_the_clients() -> None:
    degrees = [choose_degree(10**power, 0.1, 0.1)[0] for power in (2, 3, 4, 5)]
    assert degrees[-1] < 3 * degrees[0]
    assert degrees == sorted(degrees)


def test_shares_of_a_cohort_are_counted_as_a_person_would() -> None:
    # 0.29 of 100 is 28.999999999999996 in floating point: 71 clients stay, not 72
    with pytest.raises(SettingsError, match="72 must stay, so that 42 that collude learn nothing, but 29 may drop out"):
        choose_degree(100, 0.29, 0.42, active=True)


def test_what_cannot_be_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        SettingsError, match=r"10 clients: 6 must stay.*5 may drop out.*privacy.protection.drop_outs = 0.5"
    ):
        choose_degree(10, 0.5, 0.3)
    with pytest.raises(SettingsError, match=r"federation\.cohort"):
        choose_degree(1, 0, 0)
