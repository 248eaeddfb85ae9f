"""Tokens, vocabularies and ids keep their promises on any text; the real collections are read whole."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import DataError
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits, text
from fedveil.datasets.text import PADDING, SPECIAL, UNKNOWN, encode, hashed, listed
from fedveil.datasets.tokens import tokenise

any_text = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too
messages = st.lists(any_text | st.sampled_from(["to be or not to be", "ça va? 12,5", ""]), min_size=1, max_size=12)


@given(any_text.filter(bool), st.integers(3, 10**6))
def test_a_hashed_id_is_a_bucket_agreed_in_advance(word, size):
    assert 2 <= hashed(word, size) < size
    assert hashed(word, size) == 2 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (size - 2)


def test_hashing_is_the_same_on_every_machine():
    assert zlib.crc32(b"123456789") == 0xCBF43926  # the published check value of CRC-32
    assert hashed("123456789", 4000) == 2 + 0xCBF43926 % 3998


@given(messages, st.integers(1, 8))
def test_encoding_is_what_the_slow_way_gives(texts, max_tokens):
    words = (*SPECIAL, "to", "be", "?")
    for ids in (listed(words), partial(hashed, size=50)):
        slow = [[ids(token) for token in tokenise(raw)[:max_tokens]] or [UNKNOWN] for raw in texts]
        longest = max(map(len, slow))
        encoded = encode(texts, ids, max_tokens)
        assert encoded.dtype == np.int32
        assert encoded.tolist() == [row + [PADDING] * (longest - len(row)) for row in slow]


def test_no_word_of_a_text_is_padding_or_passes_for_a_special_word():
    ids = listed((*SPECIAL, "a"))
    assert [ids(word) for word in ("a", *SPECIAL, "b")] == [2, UNKNOWN, UNKNOWN, UNKNOWN]
    assert all(tokenise(special) != [special] for special in SPECIAL)


def dataset(texts, split, **settings):
    return text.text_dataset("t", texts, np.zeros(len(texts), np.int64), ("a", "b"), split, Data(**settings))


@given(messages, st.integers(3, 12))
def test_the_vocabulary_is_the_most_frequent_words_of_the_training_texts_alone(texts, size):
    texts = [*texts, "zebra zebra zebra"]
    split = (np.arange(len(texts) - 1), np.array([len(texts) - 1]))
    made = dataset(texts, split, vocabulary_size=size, max_tokens=4)
    counts = Counter(token for raw in texts[:-1] for token in tokenise(raw))
    expected = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
    assert made.words == SPECIAL + tuple(expected)
    assert made.task.vocabulary_size == len(made.words) <= size
    assert made.test.features[0, :3].tolist() == [listed(made.words)("zebra")] * min(3, made.task.shape[0])


def test_with_hashing_the_data_set_has_buckets_and_no_words():
    made = dataset(["one two", "three"], splits.shuffled(2, 0.5), vocabulary="hashed", vocabulary_size=100)
    assert made.words is None
    assert made.task.vocabulary_size == 100
    ids = np.concatenate([made.train.features, made.test.features])
    assert set(ids.ravel().tolist()) == {PADDING, *(hashed(word, 100) for word in ("one", "two", "three"))}


def test_a_vocabulary_file_is_taken_whole_and_in_its_order(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("two\n!\none\n", "utf-8")
    made = dataset(["One two three!", "x"], (np.array([0]), np.array([1])), vocabulary=str(path), vocabulary_size=3)
    assert made.words == (*SPECIAL, "two", "!", "one")
    assert made.task.vocabulary_size == 5
    assert made.train.features.tolist() == [[4, 2, UNKNOWN, 3]]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"one\ntwo\none\n", "line 3: 'one' is already on line 1"),
        (b"one\nDon't\n", "line 2"),
        (b"one\n\ntwo\n", "line 2"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_vocabulary_file_that_cannot_be_used_is_refused(tmp_path, content, found):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=found):
        text.read_vocabulary(path)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc")), max_size=20))
def test_exact_repeats_are_dropped_and_the_first_of_each_is_kept(examples):
    kept = text.distinct([label for label, _ in examples], [t for _, t in examples])
    assert [examples[i] for i in kept] == list(dict.fromkeys(examples))
    assert all(examples.index(examples[i]) == i for i in kept)


def test_quotes_tabs_and_other_line_breaks_inside_messages_are_text(tmp_path):
    path = tmp_path / "sms"
    path.write_bytes('ham\t"Hi, he said\nspam\tone\u2028two\x0cthree"\nham\t\n'.encode())
    assert text.read_sms(path) == ([0, 1, 0], ['"Hi, he said', 'one\u2028two\x0cthree"', ""])


@pytest.mark.parametrize("line", ["ham no tab", "ham\ttwo\ttabs", "eggs\thello", "", "Ham\thello"])
def test_a_line_that_is_no_message_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "sms"
    path.write_text(f"ham\tfine\n{line}\nspam\tfine\n", "utf-8")
    with pytest.raises(DataError, match="line 2"):
        text.read_sms(path)


def test_messages_that_are_not_utf_8_are_refused(tmp_path):
    path = tmp_path / "sms"
    path.write_bytes(b"ham\t\xff\n")
    with pytest.raises(DataError, match="cannot be read"):
        text.read_sms(path)


@pytest.mark.parametrize(("drop", "size"), [(False, 5574), (True, 5171)])
def test_text_messages_are_the_published_ones(real_data, drop, size):
    made = text.sms(Data(dataset="sms", drop_duplicates=drop, max_tokens=1000))
    assert len(made.train) + len(made.test) == size
    assert made.files == (("403 exact repeats left out",) if drop else ())
    assert len(made.test) == round(size * 0.2)
    spam = int(made.train.labels.sum() + made.test.labels.sum())
    lines = (real_data / "sms/SMSSpamCollection").read_text("utf-8").split("\n")[:-1]
    lines = list(dict.fromkeys(lines)) if drop else lines
    assert spam == sum(line.startswith("spam\t") for line in lines)
    assert drop or spam == 747
    tokens = sum(len(tokenise(line.partition("\t")[2])) or 1 for line in lines)
    assert (made.train.features != PADDING).sum() + (made.test.features != PADDING).sum() == tokens


def test_the_same_messages_are_tested_on_whatever_else_is_asked_for(real_data):
    made = text.sms(Data(dataset="sms", vocabulary="hashed"))
    same = text.sms(Data(dataset="sms", vocabulary="hashed", clients=3, partition="shards"))
    assert np.array_equal(same.test.features, made.test.features)
    assert np.array_equal(same.test.labels, made.test.labels)


def enron_lines(real_data):
    """Every mail: label, mailbox and text, read another way."""
    for label, name in enumerate(("ham", "spam")):
        with gzip.open(
            real_data / f"enron/{name}.txt.gz", "rt", encoding="utf-8", errors="ignore", newline="\n"
        ) as file:
            for number, line in enumerate(file, 1):
                yield label, int(number > (3672, 1500)[label]), line.removesuffix("\n")


def test_mails_are_the_published_ones_and_keep_their_mailbox(real_data):
    mails = list(enron_lines(real_data))
    assert len(mails) == 10347
    made = text.enron(Data(dataset="enron", drop_duplicates=False, vocabulary="hashed", max_tokens=40))
    assert len(made.train) + len(made.test) == 10347
    assert made.group_names == ("enron1", "enron5")

    def rows(examples, groups):
        return Counter(zip(examples.labels.tolist(), groups, map(bytes, examples.features), strict=True))

    texts = [mail for _, _, mail in mails]
    ids = encode(texts, partial(hashed, size=4000), 40)
    train, _ = splits.shuffled(10347, 0.2)
    kept = [mails[i] for i in train]
    expected = Counter((label, group, bytes(ids[i])) for i, (label, group, _) in zip(train, kept, strict=True))
    assert rows(made.train, made.groups.tolist()) == expected


def test_groups_stay_with_their_mails_when_repeats_are_dropped(real_data):
    first = {}
    for label, group, mail in enron_lines(real_data):
        first.setdefault((label, mail), group)
    assert len(first) == 4819 + 5135
    made = text.enron(Data(dataset="enron", vocabulary="hashed", max_tokens=1))
    train, _ = splits.shuffled(len(first), 0.2)
    groups = list(first.values())
    assert made.groups.tolist() == [groups[i] for i in train]
    assert len(made.groups) == len(made.train)
