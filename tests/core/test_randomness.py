"""Named streams: the same address gives the same numbers, another address gives others, global state is untouched."""

from __future__ import annotations

import random

import numpy as np
import torch
from helpers.drawing import slow_key, split_mix
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.randomness import Stream, global_random, keys, torch_random

addresses = st.builds(Stream, st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 10**6))


@given(addresses, st.text(max_size=20))
def test_the_same_address_gives_the_same_numbers(stream: Stream, purpose: str) -> None:
    again = Stream(stream.seed, stream.round, stream.client)
    assert (
        stream.generator(purpose).integers(0, 2**62, 8).tolist()
        == again.generator(purpose).integers(0, 2**62, 8).tolist()
    )
    assert stream.integer(purpose) == again.integer(purpose)


def test_every_part_of_the_address_counts() -> None:
    streams = [Stream(1, 2, 3), Stream(2, 2, 3), Stream(1, 3, 3), Stream(1, 2, 4), Stream(1, 3, 2)]
    drawn = {tuple(s.generator(p).integers(0, 2**62, 4).tolist()) for s in streams for p in ("batches", "dropout")}
    assert len(drawn) == 10


def test_numbers_of_neighbouring_streams_are_uncorrelated() -> None:
    draws = np.stack([Stream(0, 1, client).generator("x").random(2000) for client in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.12  # 5.4 standard deviations of 1/sqrt(2000)


def test_keys_are_those_of_splitmix64_as_published() -> None:
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [split_mix(1234567, i) for i in range(5)] == wanted  # the reference program's first numbers of this seed


@given(
    st.lists(addresses, min_size=1, max_size=4), st.text(max_size=9), st.lists(st.integers(0, 2**64 - 1), min_size=1)
)
def test_keys_of_a_cohort_are_those_of_each_client_alone(streams: list[Stream], name: str, counters: list[int]) -> None:
    found = keys(streams, name, np.array(counters, np.uint64))
    assert found.tolist() == [[slow_key(stream, name, counter) for counter in counters] for stream in streams]
    assert [
        keys([stream], name, np.array([counters], np.uint64))[0, 0].tolist() for stream in streams
    ] == found.tolist()


def test_every_part_of_the_address_counts_for_keys() -> None:
    streams = [Stream(1, 2, 3), Stream(2, 2, 3), Stream(1, 3, 3), Stream(1, 2, 4), Stream(1, 3, 2)]
    drawn = np.concatenate([keys(streams, purpose, np.arange(1000, dtype=np.uint64)) for purpose in ("a", "b")])
    assert len(np.unique(drawn)) == drawn.size


def test_keys_of_neighbouring_streams_are_uncorrelated() -> None:
    draws = keys([Stream(0, 1, client) for client in range(20)], "x", np.arange(2000, dtype=np.uint64)) / 2.0**64
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.12  # 5.4 standard deviations of 1/sqrt(2000)


def test_a_borrowed_global_generator_is_put_back() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    with global_random(Stream(0), "a"), torch_random(Stream(0), "a"):
        inside = (random.random(), np.random.rand(), torch.rand(1).item())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before
    with global_random(Stream(0), "a"), torch_random(Stream(0), "a"):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == inside != before
