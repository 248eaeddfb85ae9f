"""Sentences in order, from the update of an LSTM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fast_attacks import LAST, LSTM, POOLED, STEP, sentences
from claims.slow_attacks import fresh, observe

from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.words.order import ORDER, Trial, _moves

TEXT = Task("text", (8,), ("ham", "spam"), vocabulary_size=60)
SMALL = Model(name="lstm", embedding=8, units=12, pooling="last")
SENTENCE = [9, 4, 30, 2, 17, 51]


def case(model: Model = SMALL, training: Training = STEP, sentence: list[int] = SENTENCE) -> tuple[Known, Observation]:
    known = Known(TEXT, model, build(TEXT, model, Stream(3)))
    ids = np.array([sentence + [0] * (8 - len(sentence))], np.int32)
    (seen,) = observe(known, fresh(known, 1), [Examples(ids, np.array([1]))], training, 0)
    return known, seen


@pytest.mark.parametrize("model", [LAST, LSTM], ids=["last state", "mean of states"])
def test_real_messages_are_found_whole_and_in_order(real_data, model):
    assert sentences(model, STEP, 0, 8) >= 0.9


@pytest.mark.parametrize(
    "training",
    [STEP, Training(epochs=4), Training(epochs=2, momentum=0.9), Training(optimizer="adam", learning_rate=0.01)],
    ids=["step", "epochs", "momentum", "adam"],
)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_any_local_training_is_done_again_where_it_is_known(training, pooling):
    known, seen = case(Model(**SMALL.dump() | {"pooling": pooling}), training)
    assert launch("order", ORDER, seen, known, Stream(0)) == SENTENCE


def test_without_the_training_one_step_is_found_from_its_direction_and_a_gradient_too():
    known, seen = case()
    assert launch("order", ORDER, replace(seen, training=None), known, Stream(0)) == SENTENCE
    gradient = {name: change / -0.1 for name, change in (seen.update or {}).items()}
    as_gradient = replace(seen, kind="gradient", update=gradient, training=None)
    assert launch("order", ORDER, as_gradient, known, Stream(0)) == SENTENCE


def test_only_the_right_order_and_label_give_the_update():
    known, seen = case()
    found = np.sort(SENTENCE)
    right = np.argsort(np.argsort(SENTENCE))
    trial = Trial(seen, known, "embedding.weight", found)
    orders = np.array([right, right[::-1], np.roll(right, 1)])
    cosines = trial.cosines(orders, 1)
    assert found[right].tolist() == SENTENCE
    assert cosines[0] > 1 - 1e-6
    assert max(cosines[1:]) < 1 - 1e-4
    assert trial.cosines(orders[:1], 0)[0] < 0


def test_moves_are_all_orders_in_which_one_word_stands_elsewhere():
    order = np.array([2, 0, 3, 1])
    moves = {tuple(row) for row in _moves(order, 3)}
    assert moves == {(3, 2, 0, 1), (2, 3, 0, 1), (2, 0, 1, 3)}


def test_a_text_of_one_word_or_none_needs_no_search():
    known, seen = case(sentence=[7])
    assert launch("order", ORDER, seen, known, Stream(0)) == [7]
    nothing = {name: np.zeros_like(change) for name, change in (seen.update or {}).items()}
    assert launch("order", ORDER, replace(seen, update=nothing), known, Stream(0)) == []


def test_it_is_refused_where_order_does_not_matter_or_clients_are_mixed():
    known, seen = case()
    assert refusal(ORDER, seen, known) is None
    assert "aggregate" in (refusal(ORDER, replace(seen, clients=3), known) or "")
    pooled = Known(TEXT, POOLED, build(TEXT, POOLED, Stream(0)))
    assert "whatever their order" in (refusal(ORDER, seen, pooled) or "")
    images = Task("images", (1, 2, 2), ("a", "b"))
    assert "the data are images" in (ORDER.suits(Known(images, Model(), build(images, Model(), Stream(0)))) or "")


def test_several_texts_and_dropout_are_said_beforehand_to_spoil_it():
    known, seen = case()
    assert ORDER.warn(seen, known) is None
    assert "2 texts" in (ORDER.warn(replace(seen, examples=2), known) or "")
    assert "one step of SGD is assumed" in (ORDER.warn(replace(seen, training=None), known) or "")
    dropped = replace(known, network=build(TEXT, Model(**SMALL.dump() | {"dropout": 0.3}), Stream(0)))
    assert "dropout" in (ORDER.warn(seen, dropped) or "")
