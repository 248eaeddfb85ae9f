"""The made-up messages say that they are made up, and pose a task that can be learned but not perfectly."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fedveil.core.settings.sections import Data
from fedveil.datasets.published import spam_demo
from fedveil.datasets.tokens import tokenise


def test_there_are_2000_different_messages_and_they_are_said_to_be_made_up():
    labels, texts = spam_demo.messages()
    assert len(labels) == len(set(texts)) == 2000
    assert 0.35 < labels.mean() < 0.45
    made = spam_demo.spam_demo(Data(dataset="spam-demo"))
    assert made.made_up
    assert (len(made.train), len(made.test)) == (1600, 400)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_messages_are_the_same_in_every_process(hash_seed):
    code = "from fedveil.datasets.published.spam_demo import messages; print(*messages()[1], sep=chr(10))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert printed.decode().splitlines() == spam_demo.messages()[1]


def test_no_slot_is_left_open_and_every_list_of_words_is_used():
    _, texts = spam_demo.messages()
    assert not any("{" in message or "}" in message for message in texts)
    everything = "\n".join(texts)
    assert all(word in everything for words in spam_demo.WORDS.values() for word in words)


def test_a_linear_bag_of_words_does_well_and_not_perfectly():
    made = spam_demo.spam_demo(Data(dataset="spam-demo"))

    def bag(features):
        rows = np.zeros((len(features), made.task.vocabulary_size))
        np.put_along_axis(rows, features, 1, axis=1)
        return rows[:, 1:]

    model = LogisticRegression(C=1, max_iter=1000).fit(bag(made.train.features), made.train.labels)
    assert 0.94 <= model.score(bag(made.test.features), made.test.labels) <= 0.99


def test_ham_and_spam_share_most_of_their_words():
    labels, texts = spam_demo.messages()
    ham, spam = ({t for m, label in zip(texts, labels, strict=True) if label == c for t in tokenise(m)} for c in (0, 1))
    assert len(ham & spam) > 0.5 * len(ham | spam)
