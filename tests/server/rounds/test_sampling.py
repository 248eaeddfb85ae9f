"""Who takes part follows from a named stream alone, as Flower draws under that stream, at the cost of the cohort."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.randomness import Stream, global_random
from fedveil.server.rounds.sampling import draw


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
