"""The sizes of a run's cohorts, which protections are made for."""

from __future__ import annotations

from functools import lru_cache

from fedveil.core.settings.sections import Federation

# The chance of a Poisson cohort smaller than usual, which is left out where noise is made for the usual: who sees that a
# round was left out learns of it, so it is far below delta.
SELDOM = 1e-6
RARE = 1e-9  # the chance of a Poisson cohort that is larger than the largest, and of one smaller than the smallest


def cohort_sizes(federation: Federation, clients: int) -> tuple[int, int]:
    """Return the smallest and the largest cohort of a run over so many clients.

    Of Poisson sampling they are the quantiles of the binomial distribution at `RARE` and 1 - `RARE`. A round whose
    cohort is beyond them has no protection, and is left out: delta grows by the chance of that.
    """
    if federation.sampling != "poisson":
        return federation.cohort, federation.cohort
    return _quantiles(clients, federation.cohort / clients)


def usual_cohort(federation: Federation, clients: int) -> int:
    """Return a size that cohorts have at least, but for one in a million of Poisson sampling."""
    return federation.cohort if federation.sampling != "poisson" else _quantile(clients, federation.cohort / clients)


def largest_cohort(federation: Federation, clients: int) -> int:
    """Return the most clients of a cohort, for which a protection must have room."""
    return cohort_sizes(federation, clients)[1]


@lru_cache(maxsize=64)
def _quantiles(clients: int, rate: float) -> tuple[int, int]:
    from scipy.stats import binom

    return int(binom.ppf(RARE, clients, rate)), int(binom.isf(RARE, clients, rate))


@lru_cache(maxsize=64)
def _quantile(clients: int, rate: float) -> int:
    from scipy.stats import binom

    return max(1, int(binom.ppf(SELDOM, clients, rate)))
