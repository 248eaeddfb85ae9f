"""A client's data on its own machine: its file or folder, or, for trials, its share of a known data set.

The settings of a run come from the server. From `[data]`, a client with its own file takes how texts are encoded,
the names of columns and classes, and how its file is written. It opens no path that the server names, and reads nothing but its own file. A SettingsError
from here reveals nothing of that file; a DataError may quote a line of it, and is meant for the client's owner alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedveil.core.catalog import DATASETS
from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.foreign import WORDS, printable
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import Alone, Federated, load
from fedveil.datasets.own.classes import indices, named_classes, one_spelling
from fedveil.datasets.own.files import read_table
from fedveil.datasets.own.own import check_unscaled
from fedveil.datasets.own.table import Table, count
from fedveil.datasets.published import images, synthetic
from fedveil.datasets.scaling import Scaling, limits, unusual
from fedveil.datasets.text import HAM_SPAM, PADDING, SPECIAL, distinct, encode, hashed, listed

# the tasks that clients' files must fit where the settings name one of FedVeil's data sets; texts have any length
TASKS = {
    "digits": Task("images", (1, 8, 8), images.CLASSES),
    "mnist": Task("images", (1, 28, 28), images.CLASSES),
    "sms": Task("text", (), HAM_SPAM),
    "enron": Task("text", (), HAM_SPAM),
    "spam-demo": Task("text", (), HAM_SPAM),
    "synthetic": Task("features", (synthetic.FEATURES,), tuple(str(c) for c in range(synthetic.CLASSES))),
}
Held = tuple[DataSet, Examples]  # one client's data set, and its examples, held-out ones included
MOST_MADE = 10**6  # examples of a share
VOCABULARIES = ("train", "hashed")  # those of `data.vocabulary` that are no file
_SHARE = re.compile(r"([^/\\]+):([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Source:
    """The location of a client's data: its file or folder, or a share of a data set; made by `parse_source`.

    path: absolute; None for a share
    dataset, partition, of: the share of client number `partition`, counted from 1, of `of` clients
    """

    path: Path | None = None
    dataset: str = ""
    partition: int = 0
    of: int = 0

    def __str__(self) -> str:
        return f"{self.dataset}:{self.partition}/{self.of}" if self.path is None else str(self.path)


def parse_source(words: str) -> Source:
    """Parse the value of `--data`: the path of a CSV or .npz file or a folder of images, or `DATASET:PARTITION/OF`.

    >>> parse_source("sms:2/5")
    Source(path=None, dataset='sms', partition=2, of=5)

    Whether the path exists is checked when it is read. Raise SettingsError where the words are neither.
    """
    share = _SHARE.fullmatch(words)
    if share is None:
        name = words.partition(":")[0]
        if not words or (name in DATASETS and not os.path.exists(words)):
            example = name if name in DATASETS and name != "own" else "sms"
            raise SettingsError(
                f"--data {words!r}: give the path of a CSV file, an .npz file or a folder of images; or for trials a share of "
                f"a data set as DATASET:PARTITION/OF: {example}:1/5 is the first of five clients of {example}"
            )
        return Source(Path(os.path.expanduser(words)).absolute())
    dataset, partition, of = share[1], int(share[2]), int(share[3])
    DATASETS.check(dataset, f"--data {words}")
    if dataset == "own":
        raise SettingsError(f"--data {words}: 'own' stands for a user's own file; give the path of this client's")
    if not 1 <= partition <= of:
        raise SettingsError(
            f"--data {words}: there is no share {partition} of {of}; shares of {of or 'five'} are 1 to {of or 5}"
        )
    return Source(None, dataset, partition, of)


def local(data: Data, seed: int, source: Source, client: int, words: Sequence[str] | None = None) -> Federated:
    """Load the data of one client of a run on its own machine; the result holds this client alone.

    data, seed: the run's, as the server sent them
    source: the location of the client's data
    client: counted from 0
    words: the word of each id, as in `DataSet.words`, where the settings carry the vocabulary; None where they do not

    A share of a data set is, to the byte, what a simulation gives this client. From its own file, the client takes all
    examples, except exact repeats among texts if `data.drop_duplicates`. It holds out `data.validation_fraction` as in
    a simulation, and has no test part. Its classes are those of `data.dataset`, or else `data.labels`; it may lack
    some. Texts are padded to `data.max_tokens`, because the longest text of other clients is not known.

    Raise DataError where the data is missing, damaged, or does not fit the settings; SettingsError where the settings
    do not fit this client.
    """
    if not 0 <= client < data.clients:
        raise SettingsError(
            f"data.clients = {data.clients}: the run has clients 1 to {data.clients}, and this is client {client + 1}"
        )
    made = _share(data, seed, source, client, words) if source.path is None else _own(data, source.path, words)
    dataset, train = made
    return Federated(dataset, Alone(train, client), seed, data.validation_fraction)


def schema(task: Task, words: Sequence[str] | None, columns: Sequence[str] = ()) -> dict[str, str]:
    """Return what parties must agree on before they train together, as text by name; `differences` compares two.

    words: the word of each id; None where words are hashed or there are none
    columns: names of the features in order, where they have names; their hash is told, since names tell of the data
    The number of tokens of a text is left out, because none of FedVeil's networks depends on it.
    """
    found = {"kind": task.kind, "classes": ", ".join(map(_name, task.classes))}
    if task.predicts != "classification":
        found = {"kind": task.kind, "predicts": task.predicts}
    if task.kind != "text":
        named = {"columns": _hash(json.dumps(list(columns)))} if columns else {}
        return {**found, "shape": " x ".join(map(str, task.shape)), **named}
    vocabulary = "hashed" if words is None else _hash("\n".join(words))  # no word has a line break
    return {**found, "vocabulary size": str(task.vocabulary_size), "vocabulary": vocabulary}


def _hash(text: str) -> str:
    """Return the start of a text's hash, by which two parties compare theirs; who guesses the text can tell."""
    return f"SHA-256 {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Return a line for each difference of two schemas: `classes: ham, spam here, ham, spam, smishing there`."""
    keys = dict.fromkeys([*here, *there])
    return [
        f"{printable(key, 40)}: {printable(here.get(key, 'none'), WORDS)} here, {printable(there.get(key, 'none'), WORDS)} there"
        for key in keys
        if here.get(key) != there.get(key)
    ]


def _name(word: str) -> str:
    """Return a class's name, in quotes where it could be read as several."""
    return json.dumps(word, ensure_ascii=False) if re.search(r'[,"\s]', word) or not word else word


def _share(data: Data, seed: int, source: Source, client: int, words: Sequence[str] | None) -> Held:
    """Load what client `client` of a simulation holds, without the other clients' examples and the test part."""
    if (data.dataset.name, data.clients) != (source.dataset, source.of):
        raise DataError(
            f"--data {source}: is a share of '{source.dataset}' with {source.of} clients, and the run's settings say "
            f"data.dataset = '{data.dataset}' and data.clients = {data.clients}; they must agree"
        )
    if source.partition != client + 1:
        raise SettingsError(
            f"--data {source}: is the share of client {source.partition}, and this is client {client + 1}; give it "
            f"{source.dataset}:{client + 1}/{source.of}"
        )
    if data.vocabulary not in VOCABULARIES:
        raise SettingsError(
            f"data.vocabulary = {data.vocabulary!r}: is a file on another machine; a client opens no file that a server "
            f"names: take {' or '.join(map(repr, VOCABULARIES))}"
        )
    loaded = load(data.model_copy(update={"path": None, "test_path": None}), seed)
    known = loaded.dataset.words
    if words is not None and known is not None and tuple(words) != known:
        raise DataError(
            f"--data {source}: its vocabulary is not the run's ({', '.join(_vocabularies(known, words))}); the server has "
            "other data, or another version of it"
        )
    held = int(loaded.holdings.sizes(np.array([client]))[0])
    if held > MOST_MADE:  # which a server may ask of a data set that clients make
        raise SettingsError(f"data.dataset.examples: a share of {held:,} examples, and {MOST_MADE:,} are made")
    examples, rows = loaded.holdings.examples(client)
    train = examples.take(rows)
    found = loaded.dataset
    return DataSet(found.name, found.task, train, _nothing(train), words=known, made_up=found.made_up), train


def _vocabularies(here: Sequence[str], there: Sequence[str]) -> list[str]:
    return differences(*(schema(Task("text", (), (), len(words)), words) for words in (here, there)))


def _own(data: Data, path: Path, words: Sequence[str] | None) -> Held:
    """Load all examples in a client's own file or folder, read by the run's settings."""
    known = TASKS.get(data.dataset.name)
    classes = named_classes(data)
    if known is not None and classes not in (None, known.classes):
        raise SettingsError(
            f"data.labels = {list(classes or ())}: data.dataset = '{data.dataset}' has the classes "
            f"{', '.join(known.classes)}; leave data.labels out"
        )
    classes = known.classes if known is not None else classes
    if classes is None:
        raise DataError(
            "data.labels: must name the classes, in order, in the settings of the run; a client may lack one, so its own "
            "data cannot tell them"
        )
    # the classes of a published data set are not spelled alike, so that another spelling can only mean one of them
    spelling = data if known is None else data.model_copy(update={"merge_labels": True})
    tables, merged = one_spelling([read_table(path, data, testing=True)], spelling, classes)
    table = tables[0]
    if known is not None:
        _check_fit(table, known, path, data.dataset.name)
    labels = indices(table, classes, "data.labels" if known is None else f"the classes of '{data.dataset}'")
    if data.label_column is not None:
        merged.append(f"labels are those of the column {data.label_column!r}, which the run names")
    vocabulary = None
    if table.features is not None:
        if data.ranges is not None:
            merged += _outside(table.features, data)
        train = Examples(_scaled(table, data, path), labels)
        task = Task(table.kind, table.features.shape[1:], classes)
    else:
        train, vocabulary = _texts(table.texts or [], labels, data, words)
        repeats = len(labels) - len(train)
        merged += [f"{count(repeats, 'exact repeat')} left out"] if repeats else []
        size = data.vocabulary_size if vocabulary is None else len(vocabulary)
        task = Task("text", (data.max_tokens,), classes, size)
    if len(train) < data.min_examples:
        raise DataError(
            f"{path}: {len(train):,} example(s) to learn from, fewer than the run's data.min_examples = "
            f"{data.min_examples:,}"
        )
    files = (*table.notes, *merged)
    return DataSet("own", task, train, _nothing(train), words=vocabulary, columns=table.columns, files=files), train


def _scaled(table: Table, data: Data, path: Path) -> np.ndarray:
    """Return a client's features by the run's settings, float32; raise where they cannot be scaled alike everywhere."""
    assert table.features is not None
    if table.kind != "features":
        check_unscaled(table.kind, data)
        return table.features
    if data.ranges is not None:
        low, high = limits(data, table.features.shape[1])
        # no refusal of values outside: a server could ask for one range after another, and learn the column's ends
        return Scaling("", low, high - low)(table.features.clip(low, high))
    if data.scale in ("standard", "minmax"):
        raise SettingsError(
            f"data.scale = '{data.scale}': needs the statistics of all clients' data, which no client shows; declare "
            "data.ranges, the lowest and highest value of each column"
        )
    odd = unusual(table.features, table.columns)
    if odd and data.scale == "auto":
        raise DataError(
            f"{path}: {odd}, and a client alone cannot scale features as the others do; ask for data.ranges in the run's "
            "settings, the lowest and highest value of each column, or data.scale = 'none'"
        )
    return table.features.astype(np.float32)


def _outside(features: np.ndarray, data: Data) -> list[str]:
    """Return a note on the values outside of `data.ranges`, for the client's owner."""
    low, high = limits(data, features.shape[1])
    outside = int(((features < low) | (features > high)).sum())
    return [f"{count(outside, 'value')} outside data.ranges taken as the nearest end"] if outside else []


def _check_fit(table: Table, known: Task, path: Path, name: str) -> None:
    """Raise DataError where a file does not fit the task of the data set that the settings name."""
    shape = () if table.features is None else table.features.shape[1:]
    if (table.kind, shape) != (known.kind, known.shape):
        raise DataError(
            f"{path}: holds {_described(table.kind, shape)}; data.dataset = '{name}', which the run names, has "
            f"{_described(known.kind, known.shape)}"
        )


def _described(kind: str, shape: tuple[int, ...]) -> str:
    return f"{kind} of shape {' x '.join(map(str, shape))}" if shape else kind


def _texts(
    texts: list[str], labels: np.ndarray, data: Data, words: Sequence[str] | None
) -> tuple[Examples, tuple[str, ...] | None]:
    """Encode a client's texts with their labels (int64 [n]); return them with the vocabulary that all clients share."""
    vocabulary = None if data.vocabulary == "hashed" else _vocabulary(data, words)
    ids = partial(hashed, size=data.vocabulary_size) if vocabulary is None else listed(vocabulary)
    if data.drop_duplicates:
        kept = distinct(labels.tolist(), texts)
        texts, labels = [texts[i] for i in kept], labels[kept]
    encoded = encode(texts, ids, data.max_tokens)  # [n, T]
    features = np.pad(encoded, ((0, 0), (0, data.max_tokens - encoded.shape[1])), constant_values=PADDING)
    return Examples(features, labels), vocabulary


def _vocabulary(data: Data, words: Sequence[str] | None) -> tuple[str, ...]:
    """Return the vocabulary that came with the run's settings.

    Raise SettingsError, which the server is told, where there is none; DataError where it is invalid.
    """
    if words is None:
        raise SettingsError(
            f"data.vocabulary = '{data.vocabulary}': no words came with the run's settings, and a client cannot know the "
            "others'; take data.vocabulary = 'hashed', whose buckets are agreed in advance"
        )
    vocabulary = tuple(words)
    if vocabulary[: len(SPECIAL)] != SPECIAL or len(set(vocabulary)) != len(vocabulary):
        raise DataError(
            f"data.vocabulary = '{data.vocabulary}': the {len(vocabulary):,} words that came with the run's settings are no "
            f"vocabulary: it starts with {' and '.join(SPECIAL)}, and no word stands in it twice"
        )
    return vocabulary


def _nothing(examples: Examples) -> Examples:
    """Return no examples, of the same shape, as the test part that a client does not have."""
    return examples.take(np.arange(0))
