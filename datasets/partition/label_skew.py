"""Arithmetic of partitions with label skew: drawing from Dirichlet distributions, and choosing clients' classes."""

from __future__ import annotations

import numpy as np

TRADES = 12  # rounds of trading in `balanced_owners`; each halves what is left of the regular pattern


def fill_mixes(labels: np.ndarray, sizes: np.ndarray, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the classes of each client's examples from q_k ~ Dir(alpha * p), p the share of each class.

    No class is drawn more often than it has examples. It works in passes. Clients draw for their empty slots from their
    distribution over the classes that still have examples. Where a class is drawn more often than it has examples left,
    chance decides which draws are granted. A pass that does not fill all slots exhausts a class, so there are at most
    as many passes as classes.

    labels: int64 [n]; sizes: int64 [clients], which sum to n
    Return int64 [n]: the classes of client 0's slots, then client 1's, and so on.
    """
    left = np.bincount(labels)
    prior = left / len(labels)
    client = np.repeat(np.arange(len(sizes)), sizes)
    label = np.full(len(labels), -1, np.int64)
    while (empty := label < 0).any():
        busy = np.bincount(client[empty], minlength=len(sizes)) > 0
        places = np.flatnonzero(busy[client] & (empty | (left > 0)[label]))
        places = places[np.argsort(2 * client[places] + empty[places], kind="stable")]  # a client's filled slots first
        drawn = _draw(client[places], label[places], prior * (left > 0), alpha, rng)
        new = empty[places]
        places, drawn = places[new], drawn[new]
        granted = _granted(drawn, left, rng)
        label[places[granted]] = drawn[granted]
        left = left - np.bincount(drawn[granted], minlength=len(left))
    return label


def _draw(
    client: np.ndarray, label: np.ndarray, prior: np.ndarray, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw classes for the slots whose label is -1 from their client's distribution, given the slots already filled.

    The distributions (clients x classes numbers, many too small for a float) are never computed. By Polya's urn
    (Blackwell and MacQueen 1973), after t draws the next one is new with probability a / (a + t),
    a = alpha * sum(prior), in proportion to `prior`; else it copies one of the t. Classes that have run out have prior
    0 and no slot here. That is correct: the rest of a Dirichlet draw, renormalised, is a Dirichlet draw over the rest.

    client, label: int64 [m], ordered by client, a client's filled slots first. Return int64 [m].
    """
    m = len(client)
    before = _place(client)
    total = alpha * prior.sum()
    fresh = (before == 0) | (rng.random(m) * (total + before) < total)
    root = fresh | (label >= 0)
    parent = np.arange(m)
    parent[~root] -= 1 + (rng.random(m) * before).astype(np.int64)[~root]
    while not root[parent].all():
        parent = parent[parent]
    known = np.flatnonzero(prior)
    share = np.cumsum(prior[known])
    new = known[np.searchsorted(share[:-1] / share[-1], rng.random(m), side="right")]
    return np.where(label >= 0, label, new)[parent]


def _granted(label: np.ndarray, left: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return which draws are granted, bool [m]: of each class all, or at random as many as it has examples left."""
    wanted = np.bincount(label, minlength=len(left))
    granted = np.ones(len(label), bool)
    contested = np.flatnonzero((wanted > left)[label])
    contested = contested[rng.permutation(len(contested))]
    by_class = contested[np.argsort(label[contested], kind="stable")]
    granted[by_class[_place(label[by_class]) >= left[label[by_class]]]] = False
    return granted


def balanced_owners(clients: int, each: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Give every client `each` distinct classes at random, so that numbers of owners differ by at most 1.

    Return int64 [clients, each] in 0..classes-1; the odd owners go to the lowest classes. It starts from a regular
    pattern. Then clients in random pairs trade, at random, the classes that only one of the two holds, which keeps both
    numbers: the curveball algorithm of Strona et al. 2014 (Nature Communications 5:4114).
    """
    held = (np.arange(clients * each, dtype=np.int64) % classes).reshape(clients, each)
    half = clients // 2
    for _ in range(TRADES):
        order = rng.permutation(clients)
        a, b = order[:half], order[half : 2 * half]
        pool = np.sort(np.concatenate([held[a], held[b]], axis=1), axis=1)  # [half, 2 * each]
        key = rng.random(pool.shape)
        common = pool[:, 1:] == pool[:, :-1]
        key[:, :-1][common] = -1  # a class that both hold stays with both: one copy in front, one at the back
        key[:, 1:][common] = 2
        pool = np.take_along_axis(pool, np.argsort(key, axis=1), axis=1)
        held[a], held[b] = pool[:, :each], pool[:, each:]
    return held


def deal_to_owners(labels: np.ndarray, held: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Divide the examples of each class at random and evenly among the clients that hold it.

    labels: int64 [n]; held: int64 [clients, each], the classes of each client
    Return the client of each example, int64 [n].
    """
    clients, each = held.shape
    shuffled = rng.permutation(clients)  # chance decides which clients get one example more
    flat = held[shuffled].ravel()
    holder = np.repeat(shuffled, each)[np.argsort(flat, kind="stable")]  # clients, sorted by the class they hold
    number = np.bincount(flat, minlength=int(labels.max()) + 1)
    first = np.cumsum(number) - number
    by_label = shuffled_by_label(labels, rng)
    label = labels[by_label]
    owners = np.empty(len(labels), np.int64)
    owners[by_label] = holder[first[label] + _place(label) % number[label]]
    return owners


def shuffled_by_label(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of the examples sorted by label, in random order within a label: int64 [n]."""
    shuffled = rng.permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _place(ordered: np.ndarray) -> np.ndarray:
    """Return the index of each element among its equals in a sorted array: `[2, 2, 5] -> [0, 1, 0]`."""
    sizes = np.bincount(ordered)
    place: np.ndarray = np.arange(len(ordered)) - (np.cumsum(sizes) - sizes)[ordered]
    return place
