"""What several sums show together, against a slow search with exact fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.trust import cohorts
from fedveil.privacy.trust.cohorts import exposed

ALL = "abcdefgh"


def exact_rank(rows: list[list[int]]) -> int:
    """The rank over the rational numbers, by Gauss."""
    left, rank = [[Fraction(value) for value in row] for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(left)) if left[i][column]), None)
        if pivot is None:
            continue
        left[rank], left[pivot] = left[pivot], left[rank]
        for i in range(rank + 1, len(left)):
            factor = left[i][column] / left[rank][column]
            left[i] = [value - factor * top for value, top in zip(left[i], left[rank], strict=True)]
        rank += 1
    return rank


def shows(sums: list[frozenset[str]], few: tuple[str, ...]) -> int:
    """How many independent combinations of sums are zero for everybody else."""
    everybody = [[int(name in each) for name in ALL] for each in sums]
    others = [[int(name in each) for name in ALL if name not in few] for each in sums]
    return exact_rank(everybody) - exact_rank(others)


@settings(max_examples=300)
@given(
    st.lists(st.frozensets(st.sampled_from(ALL), min_size=1), max_size=5),
    st.frozensets(st.sampled_from(ALL), min_size=1),
    st.integers(2, 5),
)
def test_a_cohort_is_refused_just_where_a_search_finds_that_it_shows_a_few(known, cohort, least):
    found = any(
        shows([*known, cohort], few) > shows(known, few) for size in range(1, least) for few in combinations(ALL, size)
    )
    assert bool(exposed(known, cohort, least)) == found


WHOLE = frozenset("abcdef")


@pytest.mark.parametrize(
    ("known", "cohort", "least", "refused"),
    [
        ([WHOLE], WHOLE - {"c"}, 2, True),
        ([WHOLE], WHOLE - {"c"}, 1, False),
        ([WHOLE], WHOLE, 6, False),  # identical
        ([WHOLE], WHOLE - {"c", "d"}, 2, False),
        ([WHOLE], WHOLE - {"c", "d"}, 3, True),
        ([WHOLE], WHOLE - {"c"} | {"x"}, 2, False),  # the difference shows how c's and x's differ, and neither
        ([WHOLE], WHOLE - {"c"} | {"x"}, 3, True),
        ([frozenset("abcd"), frozenset("cdef")], frozenset("abefgh"), 2, False),
        (
            [frozenset("ab") | frozenset("xy"), frozenset("cd") | frozenset("xy")],
            frozenset("abcdz") | frozenset("xy"),
            2,
            False,
        ),
        ([frozenset("abx"), frozenset("cdx")], frozenset("abcdx"), 2, True),  # the two less the third: x alone
        ([], frozenset("a"), 2, True),
    ],
)
def test_differences_of_two_and_combinations_of_three(known, cohort, least, refused) -> None:
    assert bool(exposed(known, cohort, least)) == refused


def test_more_small_differences_than_can_be_tested_are_refused(monkeypatch) -> None:
    known = [frozenset(f"{i} {j}" for j in range(9)) for i in range(2)]
    mixed = frozenset(f"{i} {j}" for i in range(2) for j in range(0, 9, 2))
    assert exposed(known, mixed, 2) == ""
    singles = [frozenset({name, "0", "1", "2", "3"}) for name in ALL]
    monkeypatch.setattr(cohorts, "MOST", 3)
    assert "too many small differences" in exposed(singles, frozenset(ALL) | {"0", "9"}, 3)


def test_the_primes_are_primes() -> None:
    found = {cohorts._prime() for _ in range(50)}
    assert len(found) > 45
    for prime in list(found)[:5]:
        assert 2**30 < prime < 2**31
        assert all(prime % small for small in range(2, 46341))
    assert [n for n in range(11, 200, 2) if cohorts._is_prime(n)] == [
        n for n in range(11, 200, 2) if all(n % d for d in range(2, n))
    ]
