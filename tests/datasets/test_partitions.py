"""Every partition gives each example to exactly one client, as its definition says, and refuses what cannot be."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedveil.core.catalog import PARTITIONS
from fedveil.core.errors import SettingsError
from fedveil.core.settings.section import NoSettings
from fedveil.core.settings.sections import Data
from fedveil.datasets.hold_out import hold_out
from fedveil.datasets.partition.division import Partition, Pool, divide
from fedveil.datasets.partition.natural import natural


@st.composite
def problems(draw):
    """Labels, groups, and settings of a partition; mostly such that it can be done."""
    n = draw(st.integers(1, 200))
    labels = draw(npst.arrays(np.int64, n, elements=st.integers(0, draw(st.integers(0, 12)))))
    names = tuple(f"g{i}" for i in range(draw(st.integers(1, 12))))
    groups = draw(npst.arrays(np.int64, n, elements=st.integers(0, len(names) - 1)))
    name = draw(st.sampled_from(list(PARTITIONS)))
    own = {
        "dirichlet": {"alpha": st.sampled_from([5e-324, 1e-300, 1e-3, 0.1, 1.0, 10.0, 1e300]) | st.floats(0.01, 100)},
        "label_dirichlet": {
            "alpha": st.sampled_from([5e-324, 1e-300, 1e-3, 1.0, 1e300]) | st.floats(0.01, 100),
            "self_balancing": st.booleans(),
        },
        "classes": {"classes": st.integers(1, 4)},
        "shards": {"shards": st.integers(1, 4)},
        "quantity": {"exponent": st.sampled_from([0.0, 1.0, 1e9]) | st.floats(0, 5)},
    }.get(name, {})
    data = Data(
        clients=draw(st.integers(1, n + 2)),
        partition={"name": name, **{key: draw(values) for key, values in own.items()}},
        min_examples=draw(st.integers(1, 3)),
    )
    return labels, groups, names, data


@given(problems(), st.integers(0, 2**63 - 1))
def test_every_example_goes_to_exactly_one_client_or_the_numbers_are_given(problem, seed):
    labels, groups, names, data = problem
    refused = ""
    try:
        partition = divide(labels, groups, names, data, seed)
    except SettingsError as error:
        refused = str(error)
    if refused:
        assert re.search(r"data\..*\d", refused)
        return
    assert partition.clients == data.clients
    dealt = [i for k in range(data.clients) for i in partition.indices(k).tolist()]
    assert sorted(dealt) == list(range(len(labels)))
    assert partition.sizes().tolist() == [len(partition.indices(k)) for k in range(data.clients)]
    assert partition.sizes().min() >= data.min_examples
    assert partition.order.dtype == partition.offsets.dtype == np.int64
    counts = partition.counts(labels, 13)
    for k in range(data.clients):
        assert counts[k].tolist() == np.bincount(labels[partition.indices(k)], minlength=13).tolist()
    again = divide(labels, groups, names, data, seed)
    assert np.array_equal(again.order, partition.order)
    assert np.array_equal(again.offsets, partition.offsets)


@pytest.mark.parametrize("name", ["iid", "shards", "dirichlet", "label_dirichlet", "quantity", "classes"])
def test_another_seed_gives_another_partition(name):
    labels = np.arange(200) % 10
    first, second = (divide(labels, None, (), Data(clients=10, partition=name), seed) for seed in (0, 1))
    assert not (np.array_equal(first.order, second.order) and np.array_equal(first.offsets, second.offsets))


def test_more_clients_than_examples_is_refused_up_front():
    with pytest.raises(SettingsError, match=r"data\.clients = 4: more clients than the 3 training examples"):
        divide(np.zeros(3, np.int64), None, (), Data(clients=4), 0)


def test_there_is_no_client_beyond_the_last():
    partition = divide(np.zeros(3, np.int64), None, (), Data(clients=3), 0)
    for client in (-1, 3):
        with pytest.raises(SettingsError, match="clients are 0 to 2"):
            partition.indices(client)


def test_too_small_a_client_is_refused_with_the_numbers():
    with pytest.raises(SettingsError) as refused:
        divide(np.zeros(10, np.int64), None, (), Data(clients=4, min_examples=3), 0)
    for part in ("'iid'", "2 of 4 clients", "data.min_examples = 3", "smallest has 2", "10 training examples"):
        assert part in str(refused.value)


def lost(pool, settings, rng):
    return Partition(np.arange(len(pool) - 1), np.linspace(0, len(pool) - 1, pool.clients + 1).astype(np.int64))


def repeated(pool, settings, rng):
    return Partition(np.zeros(len(pool), np.int64), np.linspace(0, len(pool), pool.clients + 1).astype(np.int64))


def too_few(pool, settings, rng):
    return Partition.of(np.zeros(len(pool), np.int64), pool.clients - 1)


def lists(pool, settings, rng):
    return [[0], [1]]


def halves(pool, settings, rng):
    return Partition.of(np.arange(len(pool)) * pool.clients // len(pool), pool.clients)


@pytest.fixture
def users_module(monkeypatch):
    import sys
    import types

    module = types.ModuleType("my_partitions")
    for function in (lost, repeated, too_few, lists, halves):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "my_partitions", module)


def test_a_users_own_partition_is_used(users_module):
    partition = divide(np.zeros(10, np.int64), None, (), Data(clients=2, partition="my_partitions:halves"), 0)
    assert partition.indices(1).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["lost", "repeated", "too_few", "lists"])
def test_a_users_own_partition_that_is_wrong_is_refused(users_module, name):
    with pytest.raises(SettingsError, match=f"my_partitions:{name}"):
        divide(np.zeros(10, np.int64), None, (), Data(clients=2, partition=f"my_partitions:{name}"), 0)


@given(st.integers(1, 300), st.integers(1, 40))
def test_iid_sizes_differ_by_at_most_one(n, clients):
    if clients <= n:
        sizes = divide(np.zeros(n, np.int64), None, (), Data(clients=clients), 0).sizes()
        assert sizes.max() - sizes.min() <= 1


def test_iid_deals_every_example_to_every_client_equally_often():
    labels = np.zeros(20, np.int64)
    held = np.zeros((20, 4))
    for seed in range(1000):
        held += divide(labels, None, (), Data(clients=4), seed).counts(np.arange(20), 20).T
    # Each cell is Binomial(1000, 1/4): standard deviation 13.7.
    assert abs(held - 250).max() < 5 * 13.7


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_shards_of_one_label_each_give_a_client_at_most_that_many_labels(clients, each, classes, size):
    """With whole shards of a label, as in McMahan et al. 2017: 2 shards are at most 2 digits."""
    number = clients * each
    labels = np.repeat(np.arange(number) % classes, size)
    partition = divide(labels, None, (), Data(clients=clients, partition={"name": "shards", "shards": each}), 0)
    assert set(partition.sizes().tolist()) == {each * size}
    counts = partition.counts(labels, classes)
    assert (counts % size == 0).all()
    assert ((counts > 0).sum(axis=1) <= each).all()


def test_more_shards_than_examples_are_refused():
    with pytest.raises(SettingsError, match="5 clients need 15 shards, and there are 14 training examples"):
        divide(np.zeros(14, np.int64), None, (), Data(clients=5, partition={"name": "shards", "shards": 3}), 0)


@given(st.integers(1, 40), st.integers(0, 400), st.floats(0, 6), st.integers(1, 5))
def test_quantity_sizes_are_largest_remainders_of_a_power_law(clients, rest, exponent, least):
    n = clients * least + rest
    data = Data(clients=clients, partition={"name": "quantity", "exponent": exponent}, min_examples=least)
    sizes = np.sort(divide(np.zeros(n, np.int64), None, (), data, 0).sizes())[::-1]
    weights = [r**-exponent for r in range(1, clients + 1)]
    shares = [rest * weight / sum(weights) for weight in weights]
    assert sizes.sum() == n
    assert all(abs(size - least - share) < 1 + 1e-6 for size, share in zip(sizes, shares, strict=True))


def test_quantity_deals_ranks_at_random_and_mixes_labels_alike():
    labels = np.arange(20_000) % 2
    data = Data(clients=10, partition="quantity")
    largest = {int(divide(labels, None, (), data, seed).sizes().argmax()) for seed in range(40)}
    assert len(largest) > 5
    counts = divide(labels, None, (), data, 0).counts(labels, 2)
    assert abs(counts[:, 0] / counts.sum(axis=1) - 0.5).max() < 0.1


def test_quantity_without_enough_for_the_minimum_is_refused():
    with pytest.raises(SettingsError, match="5 clients need 15 examples, and there are 14"):
        divide(np.zeros(14, np.int64), None, (), Data(clients=5, partition="quantity", min_examples=3), 0)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32))
def test_classes_are_distinct_balanced_and_dealt_evenly(clients, each, classes, seed):
    labels = np.concatenate([np.full(40 + 3 * c, 2 * c) for c in range(classes)])  # odd labels do not occur
    data = Data(clients=clients, partition={"name": "classes", "classes": each})
    if each > classes or clients * each < classes:
        with pytest.raises(SettingsError, match=r"data\.partition\.classes"):
            divide(labels, None, (), data, seed)
        return
    counts = divide(labels, None, (), data, seed).counts(labels, 2 * classes)[:, ::2]
    assert ((counts > 0).sum(axis=1) == each).all()
    owners = (counts > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    assert owners.min() >= 1
    for c in range(classes):
        dealt = counts[:, c][counts[:, c] > 0]
        assert dealt.max() - dealt.min() <= 1


@pytest.mark.parametrize(
    ("clients", "each", "found"),
    [
        (4, 6, "have 5 classes, so no client can hold 6"),
        (2, 2, r"2 client\(s\) with 2 each hold 4 at most"),
        (10, 2, "make 4 owners of class 0, which has 3 examples"),
    ],
)
def test_classes_that_cannot_be_dealt_are_refused_with_the_numbers(clients, each, found):
    labels = np.concatenate([[0, 0, 0], np.repeat([1, 2, 3, 4], 50)])
    with pytest.raises(SettingsError, match=found):
        divide(labels, None, (), Data(clients=clients, partition={"name": "classes", "classes": each}), 0)


def plain_natural(groups, number, clients):
    """Largest group first, to the client with least so far: the sizes of the groups each client gets."""
    sizes = sorted(((groups == g).sum() for g in range(number)), reverse=True)
    held = [[] for _ in range(clients)]
    for size in sizes:
        min(held, key=sum).append(int(size))
    return sorted(sorted(client) for client in held)


@given(problems())
def test_natural_keeps_groups_whole_and_clients_alike(problem):
    labels, groups, names, _ = problem
    for clients in range(1, len(names) + 1):
        partition = natural(Pool(labels, clients, 1, groups, names), NoSettings(), np.random.default_rng(0))
        owners = [{k for k in range(clients) if g in groups[partition.indices(k)]} for g in range(len(names))]
        assert all(len(who) <= 1 for who in owners)
        if clients == len(names):
            assert all(who <= {g} for g, who in enumerate(owners))
        else:
            loads = sorted(sum(client) for client in plain_natural(groups, len(names), clients))
            assert sorted(partition.sizes().tolist()) == loads


def test_natural_needs_sources_and_says_which_data_sets_have_them():
    with pytest.raises(SettingsError, match=r"'digits' does not say .* 'enron' .* data.group_column"):
        divide(np.zeros(5, np.int64), None, (), Data(clients=2, partition="natural"), 0)


def test_natural_refuses_more_clients_than_sources_by_name():
    with pytest.raises(SettingsError, match="more clients than the 2 sources of the data: north, south"):
        divide(np.zeros(5, np.int64), np.arange(5) % 2, ("north", "south"), Data(clients=3, partition="natural"), 0)


def test_natural_refuses_a_source_without_training_examples():
    with pytest.raises(SettingsError, match="1 of 2 clients would hold fewer"):
        divide(
            np.zeros(5, np.int64), np.zeros(5, np.int64), ("north", "south"), Data(clients=2, partition="natural"), 0
        )


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=60), st.floats(0, 0.999), st.integers(0, 99))
def test_holding_out_divides_a_clients_examples_and_keeps_both_parts_alive(indices, fraction, seed):
    given_order = np.array(indices, np.int64)
    train, validation = hold_out(given_order, fraction, np.random.default_rng(seed))
    assert sorted([*train, *validation]) == sorted(indices)
    n = len(indices)
    if n < 2 or fraction == 0:
        assert len(validation) == 0
    else:
        assert len(validation) == min(max(round(n * fraction), 1), n - 1)
        assert [i for i in indices if i in set(train)] == train.tolist()


@pytest.mark.parametrize("name", ["iid", "shards", "dirichlet", "quantity", "classes", "natural"])
def test_a_hundred_thousand_clients_are_divided(name):
    labels = np.arange(250_000) % 10
    groups = np.arange(250_000) % 100_000
    own = {"alpha": 0.1} if name == "dirichlet" else {}
    data = Data(clients=100_000, partition={"name": name, **own})
    partition = divide(labels, groups, tuple(map(str, range(100_000))), data, 0)
    assert partition.sizes().min() >= 1
