"""Words from updates: of real messages, of the book's sentence, of several clients; and where it says that it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fast_attacks import LAST, LSTM, POOLED, STEP, mean, victims, words
from claims.slow_attacks import draw, fresh, mean_of, messages, observe
from torch import Tensor

from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Data, Training
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.text import enron
from fedveil.datasets.tokens import tokenise
from fedveil.models import parameters as weights
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.lab.scoring import Truth, score_words
from fedveil.simulations.attacks.words.words import WORDS

BOOK = ("my", "computer", "password", "is", "pizza")
TEXT = Task("text", (6,), ("ham", "spam"), vocabulary_size=50)


def read(seen: Observation, known: Known) -> dict[int, int]:
    return launch("words", WORDS, seen, known, Stream(0))


def update_of(task: Task, model: Model, client: Examples, training: Training = STEP) -> tuple[Known, Observation]:
    known = Known(task, model, build(task, model, Stream(0)))
    (seen,) = observe(known, fresh(known, 0), [client], training, 0)
    return known, seen


@pytest.mark.parametrize("epochs", [1, 5])
@pytest.mark.parametrize(("batch", "clients"), [(1, 20), (8, 4), (32, 2)])
def test_a_network_that_pools_words_gives_all_of_them_away_and_no_others(real_data, epochs, batch, clients):
    scores = words(POOLED, STEP.model_copy(update={"epochs": epochs}), 0, clients, batch)
    assert mean(scores, "recall") == mean(scores, "precision") == 1
    if batch == 1:
        assert mean(scores, "counted") == 1


@pytest.mark.parametrize(("model", "recall"), [(LSTM, 1.0), (LAST, 0.92)], ids=["mean of states", "last state"])
def test_an_lstm_gives_words_away_that_float32_does_not_round_off(real_data, model, recall):
    """From the last state alone, the first words of messages of more than 32 move no row by what float32 holds."""
    drawn = draw(messages(), 0, 50, 1)
    known, seen = victims(messages(), model, STEP, 0, drawn)
    scores = [score_words(read(s, known), Truth(c), known.task) for s, c in zip(seen, drawn, strict=True)]
    brief = [score for score, c in zip(scores, drawn, strict=True) if (c.features > 0).sum() <= 32]
    assert mean(scores, "precision") == 1
    assert mean(scores, "recall") >= recall
    assert len(brief) > 30
    assert mean(brief, "recall") >= 0.97


@pytest.mark.parametrize("model", [POOLED, LSTM, LAST], ids=["mean-pool", "mean of states", "last state"])
@pytest.mark.parametrize(
    "training",
    [{"weight_decay": 1e-4}, {"weight_decay": 1e-2, "epochs": 5}, {"optimizer": "adamw", "weight_decay": 0.01, "learning_rate": 1e-3}],
    ids=["sgd", "strong", "adamw"],
)  # fmt: skip
def test_weight_decay_hides_no_words_among_all_the_rows_it_moves(real_data, model, training):
    scores = words(model, STEP.model_copy(update=training), 0, 8)
    assert mean(scores, "precision") >= 0.99
    assert mean(scores, "recall") >= (0.99 if model is not LAST else 0.8)


def book(data: DataSet, text: tuple[str, ...]) -> Examples:
    ids = np.zeros((1, *data.task.shape), np.int32)
    ids[0, : len(text)] = [data.words.index(word) for word in text]
    return Examples(ids, np.array([0]))


def test_the_sentence_of_the_book_is_read_whole_from_its_model(real_data):
    experiment = Experiment.find("enron-book")
    data = enron(experiment.data)
    known, seen = update_of(data.task, experiment.model, book(data, BOOK), experiment.training)
    assert [data.words[word] for word in read(seen, known)] == sorted(BOOK, key=data.words.index)


def test_the_model_of_the_book_tells_most_words_after_it_was_trained_but_of_mails_it_is_sure_of(real_data):
    experiment = Experiment.find("enron-book")
    data = enron(Data(**{**experiment.data.model_dump(), "vocabulary_size": 5000}))
    known = Known(data.task, experiment.model, build(data.task, experiment.model, Stream(0)))
    drawn = draw(data, 0, 1500, 1)
    both = [np.concatenate([getattr(client, part) for client in drawn[60:]]) for part in ("features", "labels")]
    training = experiment.training.model_copy(update={"epochs": 2})
    (learnt,) = observe(known, fresh(known, 0), [Examples(*both)], training, 0)
    start = observe(known, _after(learnt), drawn[:60], training, 0)
    scores = [score_words(read(s, known), Truth(c), known.task) for s, c in zip(start, drawn, strict=False)]
    spoken = [score for score in scores if score["recall"] > 0]  # a sigmoid near 0 or 1 moves nothing at all
    assert mean(spoken, "precision") == 1
    assert mean(scores, "recall") >= 0.6
    assert len(spoken) < len(scores)


def _after(seen: Observation) -> dict[str, Tensor]:
    assert seen.before is not None
    assert seen.update is not None
    return weights.from_numpy({name: (w + seen.update[name]).astype(np.float32) for name, w in seen.before.items()})


@pytest.mark.parametrize("often", [1, 2, 7])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_repeated_words_are_counted(often, pooling):
    ids = np.zeros((1, 12), np.int32)
    ids[0, : often + 3] = [5] * often + [7, 9, 9]
    known, seen = update_of(
        Task("text", (12,), ("ham", "spam"), 50), Model(name="bag", pooling=pooling), Examples(ids, np.array([1]))
    )
    assert read(seen, known) == {5: often, 7: 1, 9: 2}


def test_of_several_texts_or_states_of_an_lstm_words_are_read_and_not_counted():
    ids = np.array([[5, 5, 7, 0, 0, 0], [9, 7, 0, 0, 0, 0]], np.int32)
    for model, rows in ((Model(name="bag"), 2), (LSTM, 1)):
        known, seen = update_of(TEXT, model, Examples(ids[:rows], np.array([0, 1][:rows])))
        assert set(read(seen, known).values()) == {1}


def test_the_mean_of_clients_gives_the_words_of_all():
    rng = np.random.default_rng(0)
    task = Task("text", (6,), ("ham", "spam"), 900)
    clients = [Examples(rng.integers(2, 900, (1, 6)).astype(np.int32), np.array([k % 2])) for k in range(8)]
    known = Known(task, POOLED, build(task, POOLED, Stream(0)))
    together = mean_of(observe(known, fresh(known, 0), clients, STEP, 0))
    assert set(read(together, known)) == set(np.concatenate([c.features for c in clients]).ravel())
    assert "8 clients" in (WORDS.warn(together, known) or "")


def test_words_are_cut_as_the_data_sets_cut_them():
    assert tokenise(" ".join(BOOK)) == list(BOOK)


def test_it_is_refused_where_there_are_no_words_to_read():
    known, seen = update_of(TEXT, LSTM, Examples(np.ones((1, 6), np.int32), np.array([0])))
    assert refusal(WORDS, seen, known) is None
    assert "saw protected bytes" in (refusal(WORDS, replace(seen, update=None, kind="ciphertext"), known) or "")
    images = Task("images", (1, 2, 2), ("a", "b"))
    assert "the data are images" in (WORDS.suits(Known(images, Model(), build(images, Model(), Stream(0)))) or "")
    larger = replace(TEXT, vocabulary_size=3000)
    assert "no word table" in (WORDS.suits(Known(larger, LSTM, known.network)) or "")


def test_adam_is_said_beforehand_to_hide_counts():
    known, seen = update_of(TEXT, LSTM, Examples(np.ones((1, 6), np.int32), np.array([0])), Training(optimizer="adam"))
    assert "which words occur" in (WORDS.warn(seen, known) or "")
    assert WORDS.warn(replace(seen, training=None), known) is None
