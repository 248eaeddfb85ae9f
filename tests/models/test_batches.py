"""Batches of one client, of a cohort, and chunks of it, against what a person would write down for each client."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.drawing import slow_key
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models.local import training
from fedveil.models.local.batches import batch_size_of, cut, orders, plan, steps_of
from fedveil.models.local.room import Limits

some_training = st.builds(
    Training,
    batch_size=st.sampled_from([1, 4, 7, "full"]),
    epochs=st.integers(1, 3),
    steps=st.none() | st.integers(1, 9),
)


def slow_order(n: int, stream: Stream, number: int) -> list[int]:
    """A client's order in a pass: its examples by the upper 31 bits of their keys."""
    return sorted(range(n), key=lambda i: (slow_key(stream, "batches", number * 2**32 + i) >> 33, i))


@given(st.integers(1, 40), some_training, st.lists(st.builds(Stream, st.integers(0), st.integers(0)), min_size=1))
def test_orders_of_a_cohort_sort_each_clients_own_keys(n: int, training: Training, streams: list[Stream]) -> None:
    found = orders(n, training, streams)
    assert found.shape[1:] == (-(-steps_of(n, training) // -(-n // batch_size_of(n, training))), n)
    for stream, passes in zip(streams, found, strict=True):
        assert passes.tolist() == [slow_order(n, stream, number) for number in range(len(passes))]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), some_training)
def test_the_plan_of_a_cohort_holds_the_batches_of_each_client(sizes: list[int], training: Training) -> None:
    sizes = sorted(sizes, key=lambda n: -steps_of(n, training))
    rows = [1000 - 100 * k + np.arange(n)[::-1] for k, n in enumerate(sizes)]
    found = plan(rows, training, [Stream(1, 1, k) for k in range(len(sizes))])
    for k, (n, own) in enumerate(zip(sizes, rows, strict=True)):
        wanted: list[list[int]] = []
        for number in range(steps_of(n, training)):
            order, size = slow_order(n, Stream(1, 1, k), number), batch_size_of(n, training)
            wanted += [own[order[first : first + size]].tolist() for first in range(0, n, size)]
        wanted = wanted[: steps_of(n, training)]
        assert found.sizes[:, k].tolist() == [*map(len, wanted), *[0] * (len(found.sizes) - len(wanted))]
        assert [found.rows[s, k, : len(batch)].tolist() for s, batch in enumerate(wanted)] == wanted


@pytest.mark.parametrize("where", ["clients", "rounds", "passes", "seeds"])
def test_every_order_is_as_likely_as_every_other(where: str) -> None:
    number = 24_000
    if where == "passes":
        found = orders(4, Training(batch_size=4, epochs=number), [Stream(5)])[0]
    else:
        streams = {"clients": lambda i: Stream(5, 2, i), "rounds": lambda i: Stream(5, i, 2), "seeds": Stream}[where]
        found = orders(4, Training(batch_size=4, epochs=1), [streams(i) for i in range(number)])[:, 0]
    seen = [(found == order).all(axis=1).sum() for order in permutations(range(4))]
    assert sum(seen) == number
    assert chisquare(seen).pvalue > 1e-4


def test_an_example_is_as_likely_at_every_place_of_a_long_order() -> None:
    found = orders(1000, Training(batch_size=10), [Stream(3, 1, client) for client in range(500)])[:, 0]
    places = np.argsort(found, axis=1)  # [clients, examples]
    counts = np.stack([np.bincount(own // 100, minlength=10) for own in places.T])  # [examples, tenths of the order]
    assert chisquare(counts, axis=1).pvalue.min() > 1e-3 / len(counts)
    assert chisquare(counts.reshape(10, 100, 10).sum(1), axis=None, ddof=18).pvalue > 1e-4


@given(st.lists(st.integers(1, 400), min_size=1, max_size=300), st.integers(1, 10**9))
def test_a_cohort_is_cut_into_chunks_that_hold_everybody_once_the_longest_first(sizes, numbers):
    training = Training(batch_size=10)
    chunks = cut(np.array(sizes), training, numbers, 5)
    order = np.concatenate(chunks)
    assert sorted(order) == list(range(len(sizes)))
    steps = [steps_of(sizes[k], training) for k in order]
    assert steps == sorted(steps, reverse=True)
    lengths = [len(chunk) for chunk in chunks]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= 16
    assert max(lengths) == 1 or max(lengths) * 4 * (2 * numbers + 10 * 5) <= 1 << 30


@given(st.integers(1, 40), some_training, st.integers(1, 100))
def test_passes_that_are_ordered_a_few_at_a_time_are_the_same(n: int, wanted: Training, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ORDERED", block)
        found = [batch.tolist() for batch in training._batches(n, wanted, Stream(1), torch.device("cpu"))]
    size, whole = batch_size_of(n, wanted), orders(n, wanted, [Stream(1)])[0].tolist()
    batches = [order[first : first + size] for order in whole for first in range(0, n, size)]
    assert found == batches[: steps_of(n, wanted)]


def test_a_billion_epochs_take_no_memory_before_the_first_step() -> None:
    tracemalloc.start()
    first = next(training._batches(1000, Training(epochs=10**9), Stream(1), torch.device("cpu")))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first) == 16
    assert most < 50 << 20


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=300),
    st.integers(1, 10**6),
    st.integers(1, 10**9),
    st.none() | st.integers(1, 50),
)
def test_on_a_gpu_a_chunk_keeps_to_its_limits_and_clients_of_other_lengths_are_apart(sizes, numbers, memory, most):
    training = Training(batch_size=10)
    chunks = cut(np.array(sizes), training, numbers, 5, Limits(memory, most))
    assert sorted(np.concatenate(chunks)) == list(range(len(sizes)))
    for chunk in chunks:
        steps = [steps_of(sizes[k], training) for k in chunk]
        assert max(steps) < 2 * min(steps)
        assert len(chunk) <= (most or len(sizes))
        assert len(chunk) == 1 or len(chunk) * 4 * (2 * numbers + min(10, max(sizes)) * 5) <= memory
