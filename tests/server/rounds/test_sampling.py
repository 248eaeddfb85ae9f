"""Who takes part follows from a named stream alone, as Flower draws under that stream, at the cost of the cohort."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from fedveil import Experiment, SettingsError
from fedveil.core.examples import Task
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream, global_random
from fedveil.server.rounds.sampling import Chance, Sampling, by_coins, draw, in_turn
from fedveil.server.strategies import make


@given(st.integers(0, 2**31), st.integers(1, 500), st.integers(1, 300), st.integers(1, 600))
def test_the_nodes_are_those_of_pythons_global_generator_under_the_stream(seed, number, population, cohort) -> None:
    stream, nodes = Stream(seed, number), range(1, population + 1)
    with global_random(stream, "sampling"):
        wanted = random.sample(list(nodes), min(cohort, population))
    assert draw(nodes, cohort, stream, "sampling") == wanted


def test_no_global_generator_is_read_or_moved() -> None:
    random.seed(1)
    before = random.getstate()
    first = draw(range(100), 5, Stream(3, 1), "sampling")
    assert random.getstate() == before
    random.seed(2)
    assert draw(range(100), 5, Stream(3, 1), "sampling") == first
    assert draw(range(100), 5, Stream(3, 1), "evaluation sampling") != first


def test_a_cohort_of_a_population_beyond_any_memory_is_drawn() -> None:
    assert len(set(draw(range(1, 10**15), 1000, Stream(0, 1), "sampling"))) == 1000


def probable(found: Counter[int], wanted: dict[int, float]) -> bool:
    """Whether counts are those of probabilities, by chi-square at 10^-6; rare values count as one."""
    total = sum(found.values())
    often = {value: p for value, p in wanted.items() if p * total >= 10}
    rest = (total - sum(found[value] for value in often), total * (1 - sum(often.values())))
    terms = [(found[value] - total * p) ** 2 / (total * p) for value, p in often.items()]
    terms += [(rest[0] - rest[1]) ** 2 / rest[1]] if rest[1] > 1 else []
    return bool(chi2.sf(sum(terms), len(terms) - 1) > 1e-6)


@pytest.mark.parametrize("secret", [False, True])
def test_each_client_is_drawn_by_a_coin_of_its_own(secret) -> None:
    """The size of a cohort is binomial, each client as likely, and any two are drawn together as independent ones are."""
    sizes: Counter[int] = Counter()
    each, pairs, rounds = Counter[int](), 0, 4000
    for number in range(rounds):
        stream = None if secret else Stream(5, number)
        nodes = by_coins(range(1, 21), 0.3, stream, "sampling")
        assert len(set(nodes)) == len(nodes)
        sizes[len(nodes)] += 1
        each.update(nodes)
        pairs += {3, 17} <= set(nodes)
    assert probable(sizes, {k: float(binom.pmf(k, 20, 0.3)) for k in range(21)})
    assert set(each) == set(range(1, 21))
    assert max(abs(count - 0.3 * rounds) for count in each.values()) < 6 * math.sqrt(rounds * 0.3 * 0.7)
    assert abs(pairs - 0.09 * rounds) < 6 * math.sqrt(rounds * 0.09)


def test_coins_of_a_stream_are_the_same_again_and_others_in_the_next_round() -> None:
    sampling = Sampling("poisson", 1000, 100)
    drawn = [sampling.draw(range(1, 1001), number, Chance(Stream(1, number))) for number in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_coins_of_the_operating_system_are_nobodys_to_repeat() -> None:
    sampling = Sampling("poisson", 1000, 100)
    assert sampling.draw(range(1, 1001), 1, Chance(None)) != sampling.draw(range(1, 1001), 1, Chance(None))
    assert Sampling("fixed", 1000, 20).draw(range(1, 1001), 1, Chance(None)) != draw(
        range(1, 1001), 20, None, "sampling"
    )


def test_a_million_coins_are_tossed_at_the_cost_of_the_cohort() -> None:
    nodes = by_coins(range(1, 10**12), 1e-9, Stream(0, 1), "sampling")
    assert 800 < len(set(nodes)) < 1200


def test_coins_follow_the_population_that_is_connected() -> None:
    drawn = [len(Sampling("poisson", 100, 50).draw([1, 2], n, Chance(Stream(0, n)))) for n in range(300)]
    assert set(drawn) == {0, 1, 2}
    assert abs(np.mean(drawn) - 1) < 0.25


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 5), st.data())
def test_turns_are_as_far_apart_and_as_rare_as_is_accounted(clients, rounds, seed, data) -> None:
    cohort = data.draw(st.integers(1, clients))
    taken: dict[int, list[int]] = {client: [] for client in range(clients)}
    for number in range(1, rounds + 1):
        turn = in_turn(clients, cohort, number, seed)
        assert len(set(turn)) == cohort
        for client in turn:
            taken[client].append(number)
    for turns in taken.values():
        assert len(turns) <= math.ceil(rounds * cohort / clients)
        assert all(later - earlier >= clients // cohort for earlier, later in itertools.pairwise(turns))


def test_the_order_is_the_seeds_and_who_is_not_there_misses_a_turn() -> None:
    sampling = Sampling("order", 10, 4)
    orders = [[sampling.draw(range(1, 11), n, Chance(None, seed)) for n in range(1, 6)] for seed in (7, 7, 8)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(node for turn in orders[0] for node in turn) == sorted(2 * list(range(1, 11)))
    there = [3, 5, 6]
    assert [sampling.draw(there, n, Chance(None, 7)) for n in range(1, 6)] == [
        [node for node in turn if node in there] for turn in orders[0]
    ]


@pytest.mark.parametrize("sampling", ["poisson", "order"])
def test_a_flower_strategy_draws_its_clients_itself(sampling) -> None:
    experiment = Experiment(
        federation={"strategy": "flwr.serverapp.strategy:FedAvg", "sampling": sampling, "cohort": 2},
        data={"clients": 4},
    )
    with pytest.raises(SettingsError, match=f"federation.sampling = '{sampling}': .* draws its clients itself"):
        make(experiment, MetricSet.of(Task("features", (4,), ("a", "b"))))
