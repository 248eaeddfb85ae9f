"""What an experiment trains on: loaded once, divided by the seed, the same for a client whoever asks."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.settings.sections import Data
from fedveil.datasets import federated
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.hold_out import fewest_left, hold_out


@pytest.fixture(autouse=True)
def _nothing_kept():
    federated._divided.cache_clear()
    federated._dataset.cache_clear()


def points(n: int, d: int = 2) -> Examples:
    return Examples(np.arange(n * d, dtype=np.float32).reshape(n, d), np.arange(n, dtype=np.int64) % 2)


FINE = {"name": "mine", "task": Task("features", (2,), ("a", "b")), "train": points(8), "test": points(4)}


@pytest.fixture
def users_loader(monkeypatch):
    """Sets what a user's own loader `my_data:load` returns; gives the settings it was called with."""
    module = types.ModuleType("my_data")
    calls: list[Data] = []

    def returns(made: object) -> list[Data]:
        module.load = lambda data: calls.append(data) or made
        return calls

    monkeypatch.setitem(sys.modules, "my_data", module)
    return returns


def test_clients_hold_the_training_examples_each_once():
    loaded = federated.load(Data(clients=7, validation_fraction=0.25), 3)
    parts = [part for k in range(7) for part in loaded.client(k)]
    held = np.concatenate([part.features for part in parts]).reshape(-1, 64)
    train = loaded.dataset.train.features.reshape(-1, 64)
    assert sorted(map(tuple, held)) == sorted(map(tuple, train))
    for k in range(7):
        train, validation = loaded.client(k)
        assert len(validation) == round(0.25 * (len(train) + len(validation)))


def test_a_client_holds_out_the_same_examples_whenever_it_is_asked():
    data = Data(clients=5, validation_fraction=0.3)
    first = federated.load(data, 1).client(2)
    federated._divided.cache_clear()
    federated._dataset.cache_clear()
    second = federated.load(data, 1).client(2)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.features, other.features)
        assert np.array_equal(one.labels, other.labels)


def test_clients_hold_out_by_streams_of_their_own():
    dataset = DataSet(**{**FINE, "train": points(200)})
    same = federated.Partition(np.tile(np.arange(100), 2), np.array([0, 100, 200]))
    loaded = federated.Federated(dataset, federated.Stored(dataset.train, same), 0, 0.5)
    assert not np.array_equal(loaded.client(0)[1].features, loaded.client(1)[1].features)
    other = federated.Federated(dataset, loaded.holdings, 1, 0.5)
    assert not np.array_equal(loaded.client(0)[1].features, other.client(0)[1].features)


@given(
    partition=st.sampled_from(["iid", "quantity", "shards", "dirichlet"]),
    clients=st.integers(1, 40),
    fraction=st.one_of(st.just(0.0), st.floats(0.001, 0.999)),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_sizes_are_what_clients_train_on(partition, clients, fraction, seed):
    loaded = federated.load(Data(clients=clients, partition=partition, validation_fraction=fraction), seed)
    asked = np.random.default_rng(seed).integers(0, clients, 60)
    sizes = loaded.sizes(asked)
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [len(loaded.client(int(k))[0]) for k in asked]
    everyone = [sum(map(len, loaded.client(k))) for k in range(clients)]
    assert loaded.extremes() == (min(everyone), max(everyone))
    assert loaded.fewer_than(40) == sum(n < 40 for n in everyone)


def test_counts_are_of_all_that_a_client_has():
    loaded = federated.load(Data(clients=9, partition="dirichlet", validation_fraction=0.3), 2)
    asked = np.array([8, 0, 3])
    for k, counts in zip(asked, loaded.counts(asked), strict=True):
        labels = np.concatenate([part.labels for part in loaded.client(int(k))])
        assert counts.tolist() == np.bincount(labels, minlength=10).tolist()


@pytest.mark.parametrize("clients", [[0, 10], [-1]])
def test_sizes_and_counts_of_a_client_that_does_not_exist_are_refused(clients):
    loaded = federated.load(Data(), 0)
    for ask in (loaded.sizes, loaded.counts):
        with pytest.raises(SettingsError, match=f"no client {clients[-1]}: clients are 0 to 9"):
            ask(np.array(clients))


def test_without_a_validation_fraction_nothing_is_held_out():
    assert len(federated.load(Data(), 0).client(0)[1]) == 0


def test_a_client_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="no client 10"):
        federated.load(Data(), 0).client(10)


def test_another_partition_seed_or_number_of_clients_does_not_load_the_data_again():
    first = federated.load(Data(), 0)
    assert federated.load(Data(), 0) is first
    changed = [Data(clients=3), Data(partition={"name": "dirichlet", "alpha": 3.0}), Data(validation_fraction=0.5)]
    assert all(federated.load(data, 0).dataset is first.dataset for data in changed)
    assert federated.load(Data(), 1).dataset is first.dataset
    assert federated.load(Data(test_fraction=0.5), 0).dataset is not first.dataset


def test_a_changed_file_or_data_folder_is_loaded_again(tmp_path, monkeypatch):
    path = tmp_path / "n.csv"
    path.write_text("v,label\n" + "1,a\n2,b\n" * 5, "utf-8")
    data = Data(dataset="own", path=str(path), clients=2)
    first = federated.load(data, 0)
    assert federated.load(data, 0) is first
    path.write_text("v,label\n" + "1,a\n2,b\n" * 6, "utf-8")
    second = federated.load(data, 0)
    assert len(second.dataset.train) + len(second.dataset.test) == 12
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path))
    assert federated.load(data, 0).dataset is not second.dataset


def test_a_changed_image_in_a_folder_is_seen(tmp_path):
    from PIL import Image

    def draw(value):
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            for i in range(3):
                Image.fromarray(np.full((value, 2), value, np.uint8)).save(tmp_path / label / f"{i}.png")

    draw(2)
    data = Data(dataset="own", path=str(tmp_path), clients=2)
    assert federated.load(data, 0).dataset.task.shape == (1, 2, 2)
    draw(3)
    assert federated.load(data, 0).dataset.task.shape == (1, 3, 2)


def test_a_users_own_loader_gets_all_settings(users_loader):
    calls = users_loader(DataSet(**FINE))
    data = Data(dataset="my_data:load", clients=4)
    assert federated.load(data, 0).dataset.name == "mine"
    assert calls == [data]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"train": Examples(np.zeros((3, 2), np.float32), np.zeros(4, np.int64))}, "3 features and 4 labels"),
        ({"test": Examples(np.zeros((0, 2), np.float32), np.zeros(0, np.int64))}, "test has no examples"),
        (
            {"train": Examples(np.zeros((3, 2), np.float32), np.array([0, 1, 2]))},
            "train labels are 0 to 2, its classes 0 to 1",
        ),
        ({"test": Examples(np.zeros((3, 2), np.float32), np.array([0, 1, -1]))}, "test labels are -1 to 1"),
        ({"train": Examples(np.zeros((3, 2), np.float32), np.zeros(3))}, "must be int64"),
        ({"train": Examples(np.zeros((3, 2)), np.zeros(3, np.int64))}, "features must be float32"),
        ({"train": Examples(np.zeros((3, 3), np.float32), np.zeros(3, np.int64))}, r"shape \(3, 3\)"),
        ({"train": Examples(np.full((3, 2), np.nan, np.float32), np.zeros(3, np.int64))}, "NaN"),
        ({"task": Task("features", (2,), ("a",))}, "at least 2 classes"),
        ({"groups": np.zeros(7, np.int64), "group_names": ("g",)}, "7 groups for 8"),
        ({"groups": np.ones(8, np.int64), "group_names": ("g",)}, "group_names"),
        (
            {
                "task": Task("text", (2,), ("a", "b"), 5),
                "train": Examples(np.full((2, 2), 5, np.int32), np.arange(2)),
            },
            "0 to 4",
        ),
    ],
)
def test_what_a_loader_returns_is_checked(users_loader, change, found):
    users_loader(DataSet(**{**FINE, **change}))
    with pytest.raises(DataError, match=found) as refused:
        federated.load(Data(dataset="my_data:load", clients=2), 0)
    assert "my_data:load" in str(refused.value)


def test_a_loader_that_returns_something_else_is_refused(users_loader):
    users_loader((1, 2))
    with pytest.raises(DataError, match="gave a tuple"):
        federated.load(Data(dataset="my_data:load", clients=2), 0)


def test_mailboxes_can_be_clients(real_data):
    loaded = federated.load(Data(dataset="enron", clients=2, partition="natural", vocabulary="hashed", max_tokens=4), 0)
    for k in range(2):
        assert set(loaded.dataset.groups[loaded.holdings.partition.indices(k)]) == {k}


@given(examples=st.integers(1, 300), fraction=st.floats(0, 0.9))
def test_no_client_trains_on_fewer_examples_than_the_settings_let_it_have(examples, fraction) -> None:
    least = fewest_left(Data(min_examples=examples, validation_fraction=fraction))
    for more in (0, 1, 7):
        assert least <= len(hold_out(np.arange(examples + more), fraction, np.random.default_rng(0))[0])
    assert least == len(hold_out(np.arange(examples), fraction, np.random.default_rng(0))[0])
