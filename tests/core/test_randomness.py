"""Named streams: the same address gives the same numbers, another address gives others, global state is untouched."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.randomness import Stream, global_random, torch_random

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
