"""Attacks on membership: what they reach, their arithmetic against the slow and obvious, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from claims.slow_attacks import MEMBERSHIP, MLP, OVERFIT, coverage, fresh, images, mean, mean_of, members, observe
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm
from torch import nn

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.losses import loss
from fedveil.models.networks.build import build
from fedveil.simulations.attacks.lab.attack import launch, refusal
from fedveil.simulations.attacks.lab.observation import Known
from fedveil.simulations.attacks.membership import lira
from fedveil.simulations.attacks.membership.coverage import COVERAGE, chance
from fedveil.simulations.attacks.membership.lira import LIRA, LIRA_OFFLINE, confidence
from fedveil.simulations.attacks.membership.membership import COSINE, LOSS, LOSS_DIFFERENCE, after, losses

TASK = Task("features", (5,), ("a", "b", "c"))
TEXT = Task("text", (6,), ("ham", "spam"), 30)
SMALL = Training(epochs=2, batch_size=4, learning_rate=0.1)


def made_up(seed: int, n: int, task: Task = TASK) -> Examples:
    rng = np.random.default_rng(seed)
    if task.kind == "text":
        words = rng.integers(2, task.vocabulary_size, (n, *task.shape)).astype(np.int32)
        words[np.arange(task.shape[0]) >= rng.integers(1, task.shape[0] + 1, (n, 1))] = 0
        return Examples(words, rng.integers(0, 2, n))
    return Examples(rng.random((n, *task.shape), dtype=np.float32), rng.integers(0, len(task.classes), n))


def known_of(task: Task = TASK, candidates: int = 10, **model) -> Known:
    chosen = Model(**{"hidden": (8,), **model})
    network = build(task, chosen, Stream(0))
    return Known(task, chosen, network, auxiliary=made_up(98, 60, task), candidates=made_up(97, candidates, task))


def observed(known: Known, seed: int = 0, training: Training = SMALL, n: int = 10):
    return observe(known, fresh(known, seed), [made_up(seed, n, known.task)], training, seed)[0]


def test_members_of_an_overfit_client_stand_out_in_its_own_model_and_hardly_in_the_global_one(real_data):
    scores = members(images(), MLP, OVERFIT, MEMBERSHIP, seed=0, clients=5)
    assert mean(scores["loss"]) >= 0.75
    assert mean(scores["global loss"]) <= 0.60
    assert mean(scores["difference"]) > 0.6
    assert mean(scores["cosine"]) > 0.6
    assert mean(scores["lira"]) >= 0.85
    assert mean(scores["lira"], "tpr_at_1_fpr") > 5 * 0.01  # the loss reaches about guessing
    assert mean(scores["offline"]) > mean(scores["loss"])


def test_a_message_is_known_by_its_words(real_data):
    scores = coverage(seed=0, clients=3)
    assert mean(scores) >= 0.95
    assert mean(scores, "tpr_at_1_fpr") > 0.3


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99), kind=st.sampled_from(["cross_entropy", "squared_error"]), classes=st.sampled_from([2, 3])
)
def test_losses_and_cosines_are_those_of_one_example_after_another(seed, kind, classes):
    task = Task("features", (5,), ("a", "b", "c")[:classes])
    known = known_of(task)
    if classes == 2:
        known = replace(known, network=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    before = weights.get(known.network)
    training = SMALL.model_copy(update={"loss": kind})
    (seen,) = observe(known, before, [made_up(seed, 10, task)], training, seed)
    network = known.network
    wanted, cosines = [], []
    update = np.concatenate([seen.update[name].ravel() for name in seen.update])
    for features, label in zip(known.candidates.features, known.candidates.labels, strict=True):
        example = torch.from_numpy(features)[None], torch.tensor([label])
        weights.load(network, before)
        network.zero_grad()
        loss(network(example[0]), example[1], kind).backward()
        own = np.concatenate([parameter.grad.double().numpy().ravel() for parameter in network.parameters()])
        cosines.append(-own @ update / (np.linalg.norm(own) * np.linalg.norm(update)))
        weights.load(network, weights.from_numpy(after(seen)))
        wanted.append(loss(network(example[0]), example[1], kind).item())
    weights.load(network, before)
    found = launch("loss", LOSS, seen, known, Stream(0))
    np.testing.assert_allclose(-found, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(launch("cosine", COSINE, seen, known, Stream(0)), cosines, rtol=1e-4, atol=1e-5)
    fallen = launch("loss-difference", LOSS_DIFFERENCE, seen, known, Stream(0))
    np.testing.assert_allclose(fallen, losses(network, seen.before, known.candidates, kind) - wanted, atol=1e-5)


def test_a_gradient_is_a_step_where_the_learning_rate_is_known_and_points_down_anyhow():
    known = known_of()
    delta = observed(known, training=Training(batch_size="full", learning_rate=0.1))
    gradient = replace(delta, kind="gradient", update={name: -10 * array for name, array in delta.update.items()})
    for attack in (LOSS, LOSS_DIFFERENCE, COSINE):
        ways = [launch("it", attack, seen, known, Stream(0)) for seen in (delta, gradient)]
        np.testing.assert_allclose(*ways, atol=1e-6)
    with pytest.raises(SettingsError, match="learning rate"):
        launch("loss", LOSS, replace(gradient, training=None), known, Stream(0))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1.0, 30.0]))
def test_confidence_is_the_logit_of_the_probability_of_the_class(seed, scale):
    known = known_of()
    parameters = {name: scale * tensor.numpy() for name, tensor in fresh(known, seed).items()}
    network = known.network
    weights.load(network, weights.from_numpy(parameters))
    logits = network(torch.from_numpy(known.candidates.features)).detach().double().numpy()
    rows = zip(logits, known.candidates.labels, strict=True)
    wanted = [
        row[label] - logsumexp(np.delete(row, label)) for row, label in rows
    ]  # p / (1 - p) = e^z / sum of the others'
    np.testing.assert_allclose(confidence(known, parameters, known.candidates), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("candidates", [10, 11])
def test_half_of_the_shadows_see_each_candidate_and_all_train_on_as_many_examples(monkeypatch, candidates):
    known, taken = known_of(candidates=candidates), []
    monkeypatch.setattr(lira, "train_clients", spy(taken, lira.train_clients))
    seen = observed(known, n=12)
    launch("lira", LIRA, seen, known, Stream(3))
    assert [len(client) for client in taken] == [12] * lira.SHADOWS
    for features in known.candidates.features:
        assert sum((client.features == features).all(1).any() for client in taken) == lira.SHADOWS // 2
    taken.clear()
    launch("lira-offline", LIRA_OFFLINE, seen, known, Stream(3))
    strangers = {features.tobytes() for features in known.candidates.features}
    assert not any(features.tobytes() in strangers for client in taken for features in client.features)


def spy(taken, real):
    def train(network, parameters, clients, *more, **named):
        taken.extend(clients)
        return real(network, parameters, clients, *more, **named)

    return train


def test_the_likelihood_ratio_is_that_of_two_normal_distributions():
    rng = np.random.default_rng(0)
    saw = np.tile(np.eye(2, dtype=bool).repeat(3, axis=1), (16, 1))
    confident = rng.normal(saw * 2.0, 1.5)
    mean_in, spread = lira._normal(confident, saw)
    slow = [confident[saw[:, i], i] for i in range(6)]
    np.testing.assert_allclose(mean_in, [values.mean() for values in slow])
    assert spread == pytest.approx(math.sqrt(np.mean([values.var(ddof=1) for values in slow])))
    own = rng.normal(size=6)
    found = lira._log_likelihood(own, mean_in, spread) - lira._log_likelihood(own, 0 * mean_in, 2.0)
    np.testing.assert_allclose(found, norm.logpdf(own, mean_in, spread) - norm.logpdf(own, 0, 2.0))


def test_the_same_stream_gives_the_same_scores_and_another_gives_others():
    known = known_of()
    seen = observed(known)
    first, again, other = (launch("lira", LIRA, seen, known, Stream(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not np.allclose(first, other)


def test_a_text_whose_words_all_moved_counts_more_the_rarer_they_are_and_one_that_stood_still_counts_against_it():
    known = known_of(TEXT, embedding=4)
    seen = observed(known, n=3)
    table = next(name for name in seen.update if "embedding" in name)
    moved = np.zeros((30, 4))
    moved[2:12] = 1.0
    texts = np.zeros((4, 6), np.int32)
    texts[0, :2], texts[1, :2], texts[2, :2] = (2, 3), (2, 4), (3, 20)  # the last has no words
    often = np.zeros((50, 6), np.int32)
    often[:, 0], often[:2, 1], often[2:4, 1] = 2, 3, 20
    known = replace(known, candidates=Examples(texts, np.zeros(4, int)), auxiliary=Examples(often, np.zeros(50, int)))
    scores = launch("coverage", COVERAGE, replace(seen, update={**seen.update, table: moved}), known, Stream(0))
    assert scores[1] > scores[0] > 0 > scores[2]
    assert scores[3] == 0


def test_the_chance_that_a_word_is_among_drawn_texts_is_what_drawing_gives():
    texts = made_up(5, 400, TEXT)
    rng = np.random.default_rng(0)
    drawn = [np.unique(texts.features[rng.integers(0, 400, 7)]) for _ in range(20000)]
    share = np.bincount(np.concatenate(drawn), minlength=30)[2:] / 20000
    np.testing.assert_allclose(chance(texts, 30, 7)[2:], share, atol=0.02)


def test_what_an_attack_needs_is_asked_for():
    known = known_of()
    seen = observed(known)
    together = mean_of([seen, seen])
    assert "aggregate" in refusal(LIRA, together, known)
    assert "how clients train" in refusal(LIRA, replace(seen, training=None), known)
    assert "like the clients'" in refusal(LIRA, seen, replace(known, auxiliary=None))
    assert "to ask about" in refusal(LOSS, seen, replace(known, candidates=None))
    assert "reads words" in refusal(COVERAGE, seen, known)
    assert "mean of 2 clients" in LOSS.warn(together, known)
    assert LOSS.warn(seen, known) is None
    with pytest.raises(SettingsError, match="60"):
        launch("lira-offline", LIRA_OFFLINE, replace(seen, examples=61), known, Stream(0))


def test_the_network_is_given_back_as_it_was():
    known = known_of()
    seen, own = observed(known), weights.get(known.network)
    for attack in (LOSS, LOSS_DIFFERENCE, COSINE, LIRA):
        launch("it", attack, seen, known, Stream(0))
    assert known.network.training
    assert all(
        (own[name] == parameter).all() and parameter.grad is None
        for name, parameter in known.network.named_parameters()
    )
