"""The sparse random graph of secure aggregation: which clients exchange masks, and how many neighbours are enough.

Masks with all other clients cost each client more, the more clients there are. Bell et al. 2020 ("Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead", section 3) show that a logarithmic number of neighbours is enough, if the
graph is drawn at random after the colluding clients are fixed.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedveil.core.errors import SettingsError

SECURITY = 2.0**-40  # largest chance that a graph lets the server and the colluders isolate a client
FAILURE = 2.0**-20  # largest chance that a round is abandoned although no more than `drop_outs` dropped out


@lru_cache(maxsize=64)
def choose_degree(
    clients: int,
    drop_outs: float,
    colluders: float,
    active: bool = False,
    insecure: float = SECURITY,
    failing: float = FAILURE,
) -> tuple[int, int]:
    """Return the fewest neighbours that a client needs, and the threshold of shares among them and itself.

    For a random circulant graph (Bell et al. 2020, section 3, definition of a good graph, with exact hypergeometric
    tails and a union bound). Except with the chance `insecure`, no honest client has `threshold` colluding neighbours, and
    the honest clients that stay are connected. Except with the chance `failing`, `threshold` members of every neighbourhood stay. The
    threshold is more than half of a neighbourhood, so that no two halves of it can be shown different lists. Where no
    sparse graph is that good, all clients are neighbours and 2 threshold > clients + colluders (Bonawitz et al. 2017,
    section 6.2).

    clients: in the cohort; drop_outs, colluders: shares of them, in [0, 1)
    active: the server may lie. It then draws the graph as it likes, and only the complete graph bounds how many of a
    client's neighbours collude
    Raise SettingsError where so many cannot both drop out and collude.
    """
    gone, bad = _count(clients, drop_outs), _count(clients, colluders)
    if not active:
        table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, clients + 1)))])  # log of factorials
        threshold = 0
        for degree in range(2, clients - 1, 2):
            if _disconnected(table, clients, min(gone + bad, clients), degree) > insecure / 2:
                continue
            threshold = max(threshold, (degree + 1) // 2 + 1)
            while (clients - bad) * _tail(table, threshold, clients - 1, bad, degree) > insecure / 2:
                threshold += 1
            # a client that stays holds a share of its own secret; one that drops out takes that share with it
            kept = (clients - gone) * _tail(table, degree + 2 - threshold, clients - 1, gone, degree)
            lost = gone * _tail(table, degree + 1 - threshold, clients - 1, max(gone - 1, 0), degree)
            if kept + lost <= failing:
                return degree, threshold
    safe = (clients + bad) // 2 + 1
    needed = safe if active else max(clients // 2, bad) + 1
    if clients < 2 or clients - gone < needed:
        raise SettingsError(
            f"secure aggregation of {clients:,} clients: {needed:,} must stay, so that {bad:,} that collude learn nothing, "
            f"but {gone:,} may drop out; lower privacy.protection.drop_outs = {drop_outs:g} or privacy.protection.colluders = {colluders:g}, "
            "or take a larger federation.cohort"
        )
    return clients - 1, min(safe, clients - gone)


def neighbours(clients: Sequence[int], degree: int) -> dict[int, tuple[int, ...]]:
    """Draw each client's neighbours, in rising order: a circulant graph over a random order.

    Bell et al. 2020, algorithm 2. The order comes from the operating system's randomness.
    clients: their numbers; degree: even, or len(clients) - 1
    """
    if degree >= len(clients) - 1:
        ordered = sorted(clients)
        return {client: tuple(other for other in ordered if other != client) for client in ordered}
    ring = list(clients)
    secrets.SystemRandom().shuffle(ring)
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {
        client: tuple(sorted(ring[(place + step) % len(ring)] for step in steps)) for place, client in enumerate(ring)
    }


def _count(clients: int, share: float) -> int:
    return math.floor(clients * share + 1e-9)  # 100 clients times 0.29 is 29, not 28


def _tail(table: np.ndarray, least: int, population: int, marked: int, drawn: int) -> float:
    """Return P[X >= least] for the number X of marked ones among `drawn` of a population: a hypergeometric tail."""
    if drawn > population:
        return 1.0
    x = np.arange(max(least, drawn + marked - population, 0), min(marked, drawn) + 1)
    logs = table[marked] - table[x] - table[marked - x]
    logs += table[population - marked] - table[drawn - x] - table[population - marked - drawn + x]
    logs -= table[population] - table[drawn] - table[population - drawn]
    return float(np.exp(logs).sum())


def _disconnected(table: np.ndarray, clients: int, removed: int, degree: int) -> float:
    """Return a bound on the chance that a circulant graph falls apart when so many random clients are removed.

    It takes two gaps of degree / 2 removed clients in a row: a sum over the pairs of places where they may begin.
    """
    if degree > removed:
        return 0.0
    logs = table[removed] - table[removed - degree] + table[clients - degree] - table[clients]
    return clients * (clients - 1) / 2 * math.exp(logs)
