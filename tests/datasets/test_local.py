"""A client's data on its own machine: a share is the simulation's to the byte, and a file of its own is all its own."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedveil.core.catalog import DATASETS
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import FOREIGN, Model
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import Federated, load
from fedveil.datasets.own.local import TASKS, Source, differences, local, parse_source, schema
from fedveil.datasets.text import SPECIAL, hashed, tokenise
from fedveil.models.networks.build import build, example

WORDS = (*SPECIAL, "win", "now", "see", "you", "0")
TEXT = 'label,text\nspam,"Win, now!"\nham,see you at 9\nspam,"Win, now!"\nham,\n'


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def picture(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width), 51, np.uint8)).save(path)


def same(one: Examples, other: Examples) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in ((one.features, other.features), (one.labels, other.labels))
    )


def at(path) -> Source:
    return parse_source(str(path))


def run(**settings) -> Data:
    """A run's `[data]` for clients with texts of their own."""
    return Data(**{"dataset": "sms", "clients": 3, "vocabulary": "hashed", "max_tokens": 8, **settings})


# where the data is


@given(dataset=st.sampled_from([n for n in DATASETS if n != "own"]), numbers=st.tuples(st.integers(), st.integers()))
def test_a_share_is_read_where_there_is_such_a_share_and_refused_elsewhere(dataset, numbers):
    partition, of = numbers
    words = f"{dataset}:{partition}/{of}"
    if 1 <= partition <= of < 10**9:
        assert parse_source(words) == Source(None, dataset, partition, of)
        assert str(parse_source(words)) == words
    else:
        with pytest.raises(SettingsError, match=f"--data .*{partition}/{of}"):
            parse_source(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sms:6/5", "there is no share 6 of 5; shares of 5 are 1 to 5"),
        ("sms:0/5", "there is no share 0 of 5"),
        ("sms:1/0", "there is no share 1 of 0"),
        ("smss:1/5", "no data set is called 'smss'; did you mean 'sms'"),
        ("own:1/5", "'own' stands for a user's own file"),
        ("sms", "DATASET:PARTITION/OF: sms:1/5 is the first of five clients of sms"),
        ("own", "give the path of a CSV file"),
        ("mnist:2", "mnist:1/5 is the first of five clients of mnist"),
        ("mnist:2-5", "mnist:1/5"),
        ("", "give the path of a CSV file"),
    ],
)
def test_words_that_name_no_data_are_refused_and_say_what_to_write(words, said):
    with pytest.raises(SettingsError, match=r"^--data") as refused:
        parse_source(words)
    assert said in str(refused.value)


def test_a_path_is_kept_whole_whatever_folder_it_is_read_from_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse_source("my.csv").path == tmp_path / "my.csv"
    assert parse_source("~/my.npz").path == tmp_path / "home" / "my.npz"
    assert parse_source("./a:1/2").path == tmp_path / "a:1/2"
    written(tmp_path / "sms", TEXT)
    assert parse_source("sms").path == tmp_path / "sms"


def test_a_share_of_a_users_own_loader_is_named_as_the_loader_is():
    assert parse_source("my_data:load:2/3") == Source(None, "my_data:load", 2, 3)


# a share of a data set

SHARES = {
    "digits": Data(clients=5, validation_fraction=0.2),
    "digits, skewed": Data(clients=7, partition={"name": "dirichlet", "alpha": 0.3}),
    "made up texts, words of all": Data(dataset="spam-demo", clients=4, vocabulary="train"),
    "clients that make their own": Data(
        dataset={"name": "synthetic", "examples": 20}, clients=6, partition="natural", validation_fraction=0.5
    ),
}


def promised(alone: Federated, data: Data, seed: int, client: int) -> None:
    together = load(data, seed)
    for one, other in zip(alone.client(client), together.client(client), strict=True):
        assert same(one, other)
    asked = np.array([client])
    assert alone.sizes(asked).tolist() == together.sizes(asked).tolist()
    assert alone.counts(asked).tolist() == together.counts(asked).tolist()
    assert alone.dataset.task == together.dataset.task
    assert alone.dataset.words == together.dataset.words


@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_what_a_simulation_gives_to_the_byte(name):
    data = SHARES[name]
    for client in range(data.clients):
        promised(local(data, 3, Source(None, data.dataset.name, client + 1, data.clients), client), data, 3, client)


def test_a_share_of_real_messages_is_what_a_simulation_gives_to_the_byte(real_data):
    data = Data(dataset="sms", clients=5, vocabulary="train", partition="dirichlet", validation_fraction=0.1)
    words = load(data, 0).dataset.words
    for sent in (None, words):
        promised(local(data, 0, parse_source("sms:2/5"), 1, sent), data, 0, 1)


@pytest.mark.parametrize(
    ("settings", "source"), [({}, "sms:1/10"), ({}, "digits:1/5"), ({"dataset": "mnist", "clients": 5}, "mnist:1/6")]
)
def test_a_share_of_other_data_than_the_run_names_is_refused_with_both(settings, source):
    data = Data(**settings)
    with pytest.raises(DataError) as refused:
        local(data, 0, parse_source(source), 0)
    for said in (f"--data {source}", f"data.dataset = '{data.dataset}'", f"data.clients = {data.clients}"):
        assert said in str(refused.value)


def test_a_share_of_another_client_is_refused():
    with pytest.raises(SettingsError, match="the share of client 2, and this is client 4; give it digits:4/10"):
        local(Data(), 0, parse_source("digits:2/10"), 3)


def test_a_share_with_another_vocabulary_than_the_runs_is_refused():
    data = SHARES["made up texts, words of all"]
    words = load(data, 0).dataset.words
    turned = (*words[:2], *reversed(words[2:]))
    with pytest.raises(DataError, match=r"its vocabulary is not the run's \(vocabulary: SHA-256 \w+ here, SHA-256 "):
        local(data, 0, parse_source("spam-demo:1/4"), 0, turned)
    with pytest.raises(DataError, match=rf"vocabulary size: {len(words)} here, {len(words) - 1} there"):
        local(data, 0, parse_source("spam-demo:1/4"), 0, words[:-1])


def test_a_share_of_a_users_own_loader_is_what_a_simulation_gives(monkeypatch):
    examples = Examples(np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 2)
    module = types.ModuleType("my_data")
    module.load = lambda data: DataSet("mine", Task("features", (2,), ("a", "b")), examples, examples)
    monkeypatch.setitem(sys.modules, "my_data", module)
    data = Data(dataset="my_data:load", clients=3)
    promised(local(data, 0, parse_source("my_data:load:3/3"), 2), data, 0, 2)


# one client and no other


@pytest.mark.parametrize("source", ["digits:4/10", "own"])
def test_nobody_elses_data_can_be_asked_for(tmp_path, source):
    if source == "own":
        features = np.zeros((4, 8, 8), np.float32)
        source = str(saved(tmp_path / "my.npz", features=features, labels=np.array([1, 2, 2, 9])))
    alone = local(Data(), 0, parse_source(source), 3)
    for other in (-1, 0, 2, 4, 10):
        for ask in (alone.sizes, alone.counts):
            with pytest.raises(SettingsError, match=f"no client {other} here: this machine holds the data of client 3"):
                ask(np.array([3, other]))
        with pytest.raises(SettingsError, match=f"no client {other} here"):
            alone.client(other)
    size = len(alone.client(3)[0])
    assert alone.extremes() == (size, size)
    assert [alone.fewer_than(size), alone.fewer_than(size + 1)] == [0, 1]
    assert alone.sizes(np.array([3, 3])).tolist() == [size, size]
    assert alone.counts(np.array([3, 3])).sum(axis=1).tolist() == [size, size]
    assert len(alone.dataset.test) == 0
    assert alone.dataset.test.features.shape[1:] == alone.dataset.task.shape


@pytest.mark.parametrize("client", [-1, 3])
def test_a_client_that_the_run_does_not_have_is_refused(tmp_path, client):
    path = written(tmp_path / "my.csv", TEXT)
    with pytest.raises(SettingsError, match=rf"data\.clients = 3: .* this is client {client + 1}"):
        local(run(), 0, at(path), client)


# a file of its own


def expected(data: Data, rows: list[tuple[str, str]], classes: tuple[str, ...], words) -> list[tuple[int, list[int]]]:
    """The examples a file of texts holds, one word after another."""
    found = []
    for i, (label, text) in enumerate(rows):
        if data.drop_duplicates and (label, text) in rows[:i]:
            continue
        ids = []
        for word in tokenise(text)[: data.max_tokens]:
            known = words.index(word) if words and word in words[2:] else 1
            ids.append(hashed(word, data.vocabulary_size) if words is None else known)
        ids = ids or [1]
        found.append((classes.index(label), ids + [0] * (data.max_tokens - len(ids))))
    return found


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["ham", "spam"]), st.text("win now see you 12,!\"\n<>é", max_size=12)),
        min_size=1, max_size=6,
    ),
    vocabulary=st.sampled_from(["hashed", "train", "words.txt"]),
    tokens=st.integers(1, 12),
    drop=st.booleans(),
)  # fmt: skip
def test_own_texts_become_the_ids_that_all_clients_share(tmp_path_factory, rows, vocabulary, tokens, drop):
    quoted = ['{},"{}"\n'.format(label, text.replace('"', '""')) for label, text in rows]
    path = written(tmp_path_factory.mktemp("own") / "my.csv", "label,text\n" + "".join(quoted))
    data = run(vocabulary=vocabulary, vocabulary_size=50, max_tokens=tokens, drop_duplicates=drop)
    words = None if vocabulary == "hashed" else WORDS
    alone = local(data, 0, at(path), 1, words)
    train, held_out = alone.client(1)
    examples = list(zip(train.labels.tolist(), train.features.tolist(), strict=True))
    assert examples == expected(data, rows, ("ham", "spam"), words)
    assert len(held_out) == 0
    assert alone.dataset.task == Task("text", (tokens,), ("ham", "spam"), len(words) if words else 50)
    assert alone.dataset.words == words
    assert (train.features.dtype, train.labels.dtype) == (np.int32, np.int64)


def test_a_part_of_the_clients_own_examples_is_held_out_as_in_a_simulation(tmp_path):
    features = np.arange(20, dtype=np.float32)[:, np.newaxis]
    path = saved(tmp_path / "my.npz", features=features, labels=np.arange(20) % 2)
    data = Data(
        dataset="own", path="elsewhere.npz", clients=4, labels=("0", "1"), validation_fraction=0.3, scale="none"
    )
    train, held_out = local(data, 5, at(path), 2).client(2)
    assert (len(train), len(held_out)) == (14, 6)
    both = np.concatenate([train.features, held_out.features])
    assert np.array_equal(np.sort(both, axis=0), features)
    order = Stream(5, client=2).generator("validation").permutation(20)
    assert set(held_out.features[:, 0]) == set(features[order[:6], 0])


@pytest.mark.parametrize("labels", [["ham"], ["spam"], ["ham", "spam"]])
def test_a_client_may_lack_a_class(tmp_path, labels):
    path = written(tmp_path / "my.csv", "label,text\n" + "".join(f"{label},hello\n" for label in labels))
    alone = local(run(), 0, at(path), 0)
    assert alone.dataset.task.classes == ("ham", "spam")
    assert alone.counts(np.array([0])).tolist() == [[int(c in labels) for c in ("ham", "spam")]]


def test_data_labels_name_the_classes_in_their_order_where_the_data_is_nobody_elses(tmp_path):
    path = written(tmp_path / "my.csv", "label,v\nb,1\nc,2\nb,3\n")
    data = Data(dataset="own", path="elsewhere.csv", clients=2, labels=("d", "c", "b", "a"))
    alone = local(data, 0, at(path), 0)
    assert alone.dataset.task == Task("features", (1,), ("d", "c", "b", "a"))
    assert alone.client(0)[0].labels.tolist() == [2, 1, 2]
    assert alone.counts(np.array([0])).tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("dataset", ["own", "my_data:load"])
def test_without_named_classes_the_run_is_refused(tmp_path, dataset):
    path = written(tmp_path / "my.csv", TEXT)
    with pytest.raises(DataError, match=r"^data\.labels: must name the classes, in order"):
        local(Data.model_validate({"dataset": dataset, "path": str(path)}, context=FOREIGN), 0, at(path), 0)


def test_other_classes_than_the_data_set_of_the_run_has_are_refused(tmp_path):
    path = written(tmp_path / "my.csv", TEXT)
    local(run(labels=("ham", "spam")), 0, at(path), 0)
    with pytest.raises(SettingsError, match=r"data\.dataset = 'sms' has the classes ham, spam; leave data\.labels out"):
        local(run(labels=("spam", "ham")), 0, at(path), 0)
    with pytest.raises(SettingsError, match="each once"):
        local(Data(dataset="own", path="x", labels=("a", "a")), 0, at(path), 0)


@pytest.mark.parametrize(
    ("data", "named"), [(run(), "the classes of 'sms'"), (run(dataset="own", labels=("ham", "spam")), "data.labels")]
)
def test_a_label_that_is_no_class_is_refused_with_its_file_and_line(tmp_path, data, named):
    path = written(tmp_path / "my.csv", 'label,text\nham,"two\nlines"\nsmishing,hello\n')
    with pytest.raises(DataError) as refused:
        local(data, 0, at(path), 0)
    assert str(refused.value) == f"{path}, line 4: label 'smishing' is not one of {named} (ham, spam)"


@pytest.mark.parametrize("vocabulary", ["train", "words.txt"])
def test_without_the_words_of_a_vocabulary_the_run_is_refused(tmp_path, vocabulary):
    path = written(tmp_path / "my.csv", TEXT)
    with pytest.raises(SettingsError, match=rf"data\.vocabulary = '{vocabulary}': .*take data\.vocabulary = 'hashed'"):
        local(run(vocabulary=vocabulary), 0, at(path), 0)


@pytest.mark.parametrize("words", [(), ("win", "now"), (*SPECIAL, "win", "win")])
def test_words_that_are_no_vocabulary_are_refused(tmp_path, words):
    path = written(tmp_path / "my.csv", TEXT)
    with pytest.raises(DataError, match=rf"the {len(words)} words that came .* are no vocabulary"):
        local(run(vocabulary="train"), 0, at(path), 0, words)


def test_paths_that_the_server_names_are_not_opened(tmp_path):
    path = written(tmp_path / "my.csv", TEXT)
    secret = written(tmp_path / "secret", "not a word list\n")
    data = run(dataset="own", labels=("ham", "spam"), path=str(secret), test_path=str(secret), vocabulary=str(secret))
    assert len(local(data, 0, at(path), 0, WORDS).client(0)[0]) == 3
    with pytest.raises(SettingsError) as refused:
        local(data, 0, at(path), 0)
    assert "word list" not in str(refused.value)


def test_a_column_of_sources_is_no_feature_and_a_client_may_lack_it(tmp_path):
    data = Data(dataset="own", path="x", clients=2, labels=("a", "b"), group_column="city")
    for content in ("label,city,v\na,rome,7\n", "label,v\na,7\n"):
        alone = local(data, 0, at(written(tmp_path / "my.csv", content)), 0)
        assert alone.client(0)[0].features.tolist() == [[7]]
    picture(tmp_path / "images" / "a" / "1.png", 2, 3)
    assert local(data, 0, at(tmp_path / "images"), 0).dataset.task.shape == (1, 2, 3)


def test_fewer_examples_than_every_client_must_hold_are_refused(tmp_path):
    path = written(tmp_path / "my.csv", TEXT)  # 4, one a repeat
    assert len(local(run(min_examples=3), 0, at(path), 0).client(0)[0]) == 3
    with pytest.raises(DataError, match=r"3 example\(s\) to learn from, fewer than the run's data\.min_examples = 4"):
        local(run(min_examples=4), 0, at(path), 0)


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        ("sms", "holds features of shape 2; data.dataset = 'sms', which the run names, has text"),
        ("mnist", "holds features of shape 2; data.dataset = 'mnist', which the run names, has images of shape 1 x 28 x 28"),
        ("synthetic", "holds features of shape 2; data.dataset = 'synthetic', which the run names, has features of shape 60"),
    ],
)  # fmt: skip
def test_another_kind_of_data_than_the_run_names_is_refused(tmp_path, dataset, found):
    path = written(tmp_path / "my.csv", "label,v,w\nham,1,2\n")
    with pytest.raises(DataError) as refused:
        local(Data(dataset=dataset), 0, at(path), 0)
    assert str(refused.value) == f"{path}: {found}"


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("mnist", "enron", "sms")])
def test_what_own_files_must_fit_is_what_the_data_sets_are(name):
    task = load(Data(dataset=name), 0).dataset.task
    shape = () if task.kind == "text" else task.shape
    assert TASKS[name] == Task(task.kind, shape, task.classes)


@pytest.mark.parametrize("name", ["mnist", "enron", "sms"])
def test_what_own_files_must_fit_is_what_the_real_data_sets_are(name, real_data):
    test_what_own_files_must_fit_is_what_the_data_sets_are(name)


def test_all_data_sets_that_are_fedveils_are_known_to_clients_with_own_files():
    assert {*TASKS, "own"} == set(DATASETS)


# bad data

CSV = "my.csv"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        (CSV, None, "there is no such file or folder"),
        ("x" * 300, None, "cannot be read: File name too long"),
        ("my.csv/inside", None, "there is no such file or folder"),
        (CSV, "", "the file is empty"),
        (CSV, "label,text\n", "a header and no examples"),
        (CSV, "labels,text\nham,a\n", "no column is called 'label'; did you mean 'labels'"),
        (CSV, "label;text\nham;a;b\n", "line 2: 3 value(s), where the header names 2 columns"),
        (CSV, "label,v\nham,1\nspam,nan\n", "line 3, column v: must be a finite number, it is 'nan'"),
        (CSV, b"label,text\nham,\xff\n", "not UTF-8"),
        ("my.npz", "no zip", "cannot be read"),
        ("my.npz", {"features": np.ones((2, 2))}, "no array is called 'labels'"),
        ("my.npz", {"features": np.ones((0, 2)), "labels": np.zeros(0, int)}, "features must be numbers"),
        ("my.npz", {"features": np.array([[1, np.nan]]), "labels": np.array([1])}, "features[0, 1] is nan"),
        ("my.npz", {"features": np.full((1, 2, 2), 7.0), "labels": np.array([1])}, "must lie in [0, 1]"),
    ],
    ids=range(14),
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name_and_place(tmp_path, name, content, found):
    path = tmp_path / name
    if isinstance(content, dict):
        saved(path, **content)
    elif content is not None:
        written(path, content)
    if name.endswith("inside"):
        written(path.parent, TEXT)
    with pytest.raises(DataError) as refused:
        local(run(dataset="own", labels=("ham", "spam")), 0, at(path), 0)
    assert str(refused.value).startswith(str(path))
    assert found in str(refused.value)


def test_images_of_another_size_than_the_others_are_refused_with_their_file(tmp_path):
    picture(tmp_path / "0" / "1.png", 8, 8)
    picture(tmp_path / "7" / "2.png", 8, 9)
    with pytest.raises(DataError, match=r"2\.png: 9 x 8 pixels, grey, where .*1\.png is 8 x 8 pixels, grey"):
        local(Data(), 0, at(tmp_path), 0)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folders of images"):
        local(Data(), 0, at(tmp_path), 0)


@pytest.mark.parametrize(
    ("asked", "locked"), [("stat", "my"), ("stat", "my/0"), ("iterdir", "my"), ("iterdir", "my/0")]
)
def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch, asked, locked):
    picture(tmp_path / "my" / "0" / "1.png", 8, 8)
    answer = getattr(Path, asked)

    def refuse(path, **more):
        if path == tmp_path / locked:
            raise PermissionError(13, "Permission denied")
        return answer(path, **more)

    monkeypatch.setattr(Path, asked, refuse)
    with pytest.raises(DataError, match=r"my(/0)?: cannot be read: Permission denied"):
        local(Data(), 0, at(tmp_path / "my"), 0)


# what two parties compare


def test_a_schema_says_in_words_what_must_agree():
    assert schema(Task("images", (1, 8, 8), ("0", "1")), None) == {
        "kind": "images", "classes": "0, 1", "shape": "1 x 8 x 8"
    }  # fmt: skip
    text = Task("text", (64,), ("ham", "spam"), len(WORDS))
    digest = hashlib.sha256(b"<padding>\n<unknown>\nwin\nnow\nsee\nyou\n0").hexdigest()
    assert schema(text, WORDS) == {
        "kind": "text",
        "classes": "ham, spam",
        "vocabulary size": "7",
        "vocabulary": f"SHA-256 {digest[:16]}",
    }
    assert schema(text, None)["vocabulary"] == "hashed"
    tokens = schema(Task("text", (9,), (), text.vocabulary_size, "next_token"), WORDS)
    assert (tokens["predicts"], "classes" in tokens) == ("next_token", False)


def test_texts_of_another_length_agree():
    long, short = (Task("text", (tokens,), ("ham", "spam"), 9) for tokens in (64, 7))
    assert differences(schema(long, WORDS), schema(short, WORDS)) == []


def test_differences_are_said_as_a_person_would():
    here = schema(Task("text", (9,), ("ham", "spam"), 9), None)
    there = schema(Task("text", (9,), ("ham", "spam", "smishing"), 9), None)
    assert differences(here, there) == ["classes: ham, spam here, ham, spam, smishing there"]
    images = schema(Task("images", (1, 8, 8), ("ham", "spam")), None)
    assert differences(here, images) == [
        "kind: text here, images there",
        "vocabulary size: 9 here, none there",
        "vocabulary: hashed here, none there",
        "shape: none here, 1 x 8 x 8 there",
    ]


def test_a_class_with_a_comma_is_not_taken_for_two():
    made = [schema(Task("features", (1,), names), None) for names in (("a", "b, c"), ("a, b", "c"))]
    assert differences(*made) == ['classes: a, "b, c" here, "a, b", c there']


NAMES = st.lists(st.text('ab, "\n', max_size=3), min_size=2, max_size=3, unique=True).map(tuple)
VOCABULARIES = st.none() | st.lists(st.sampled_from("abcdef"), unique=True).map(lambda w: (*SPECIAL, *w))


@given(st.tuples(NAMES, VOCABULARIES), st.tuples(NAMES, VOCABULARIES))
def test_schemas_agree_just_where_classes_and_words_do(one, other):
    made = [schema(Task("text", (5,), names, len(words or "12345678")), words) for names, words in (one, other)]
    assert (differences(*made) == []) == (one == other)


@pytest.mark.parametrize("name", ["lstm", "bag", "mlp"])
def test_networks_for_texts_of_another_length_have_the_same_weights_and_outputs(name):
    short, long = (Task("text", (tokens,), ("ham", "spam"), 30) for tokens in (5, 40))
    networks = [build(task, Model(name=name), Stream(1)).eval() for task in (short, long)]
    weights = [{key: value.numpy().tobytes() for key, value in net.state_dict().items()} for net in networks]
    assert weights[0] == weights[1]
    ids = example(short)
    padded = ids.new_zeros(len(ids), 40)
    padded[:, :5] = ids
    assert networks[0](ids).equal(networks[1](padded))
