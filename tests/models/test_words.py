"""A client's rows of a word table."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedveil.models.networks.words import PooledWords, Words, own_rows, tables, trim


@given(
    st.lists(st.lists(st.integers(0, 19), min_size=4, max_size=4), min_size=1, max_size=5).map(
        lambda rows: np.array(rows, dtype=np.int32)
    )
)
def test_own_rows_are_those_used_and_padding_and_indices_into_them_give_the_same_vectors(ids: np.ndarray) -> None:
    rows, places = own_rows(ids, 20)
    assert rows.tolist() == sorted({0, *ids.ravel().tolist()})
    table = np.arange(20) * 1.5
    np.testing.assert_array_equal(table[rows][places], table[ids])
    np.testing.assert_array_equal(places == 0, ids == 0)


def test_trim_drops_only_columns_that_are_padding_in_every_text() -> None:
    ids = torch.tensor([[5, 0, 0, 0], [1, 2, 3, 0]])
    assert trim(ids).tolist() == [[5, 0, 0], [1, 2, 3]]
    assert trim(ids[:, :3]).shape == (2, 3)
    assert trim(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 1)


def test_tables_are_named_as_parameters_are_and_a_plain_embedding_is_none() -> None:
    network = nn.ModuleDict({"a": Words(5, 2), "b": nn.Embedding(5, 2), "c": nn.Sequential(PooledWords(5, 2, "sum"))})
    names = dict(network.named_parameters())
    found = tables(network)
    assert list(found) == ["a.weight", "c.0.weight"]
    assert all(table is names[name] for name, table in found.items())
    assert list(tables(Words(5, 2))) == ["weight"]
