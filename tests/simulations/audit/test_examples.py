"""Canaries among clients' examples: held by those whose coin says so, scored by their gradients, and what they refute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedveil.client.learning.local as local
import fedveil.models.vectorized.batched as batched
from fedveil import Experiment, SettingsError
from fedveil.core.examples import Task
from fedveil.datasets.federated import load
from fedveil.models.parameters import from_numpy, get, to_numpy
from fedveil.models.parameters import load as put
from fedveil.privacy.dp.examples import own_multiplier
from fedveil.simulations.audit.examples import FIRST_WORD, ExampleCanaries, draw
from fedveil.simulations.audit.run import USUAL, Audit, audit, is_gaussian, with_canaries

EXAMPLE = {
    **USUAL,
    "federation.cohort": 10,
    "privacy.unit": "example",
    "privacy.noise_at": "client",
    "privacy.noise_multiplier": None,
    "privacy.epsilon": 3.0,
    "model.hidden": [32],
    "training.epochs": 2,
    "training.batch_size": 32,
}


def experiment(**settings: Any) -> Experiment:
    return Experiment.preset("digits").override({**EXAMPLE, **settings})


def audited(folder: Path, **settings: Any) -> Audit:
    return audit(experiment(**settings), folder / "run", canaries=400)


def test_clients_hold_their_own_examples_and_the_canaries_whose_coins_say_so() -> None:
    asked = experiment()
    own, studded = load(asked.data, asked.seed), load(with_canaries(asked, 45).data, asked.seed)
    canaries = ExampleCanaries.of(asked, 5)
    assert canaries.coins.shape == (10, 5)
    assert 0 < canaries.included.sum() < 50
    for client in range(10):
        mine, held = own.client(client)[0], studded.client(client)[0]
        assert (held.features[: len(mine)] == mine.features).all()
        rows = client * 5 + np.flatnonzero(canaries.coins[client])
        assert (held.features[len(mine) :] == canaries.examples.features[rows]).all()
        assert (held.labels[len(mine) :] == canaries.examples.labels[rows]).all()
    everyone = np.arange(10)
    assert studded.sizes(everyone).tolist() == [len(studded.client(client)[0]) for client in range(10)]
    assert (studded.counts(everyone).sum(1) == studded.sizes(everyone)).all()


def test_a_canary_of_text_is_one_word_over_and_over() -> None:
    examples, _ = draw(Task("text", (8,), ("ham", "spam"), 100), 3, 20, 0)
    assert examples.features.shape == (60, 8)
    assert (examples.features == examples.features[:, :1]).all()
    assert FIRST_WORD <= examples.features.min() <= examples.features.max() < 100
    assert set(examples.labels) == {0, 1}


def test_tasks_whose_examples_have_many_labels_are_refused() -> None:
    with pytest.raises(SettingsError, match="next_token"):
        draw(Task("text", (8,), (), 100, "next_token"), 3, 20, 0)


def test_a_step_along_one_canary_s_gradient_raises_its_score_above_all_others() -> None:
    canaries = ExampleCanaries.of(experiment(), 4)
    before = to_numpy(get(canaries.network))
    put(canaries.network, from_numpy(before))
    one = torch.from_numpy(canaries.examples.features[7:8])
    value = torch.nn.functional.cross_entropy(canaries.network(one), torch.from_numpy(canaries.examples.labels[7:8]))
    canaries.network.zero_grad()
    value.backward()
    slopes = {name: p.grad.numpy() for name, p in canaries.network.named_parameters() if p.grad is not None}
    after = {name: value - 0.1 * slopes[name] for name, value in before.items()}
    canaries.see_model(1, before, after)
    assert int(np.argmax(canaries.scores)) == 7
    every = canaries.scores.copy()
    canaries.scores[:] = 0
    canaries.see_update(1, 1, before, after)  # the client that holds canaries 4 to 7
    assert int(np.argmax(canaries.scores)) == 7
    assert np.flatnonzero(canaries.scores).tolist() == [4, 5, 6, 7]
    canaries.see_model(1, before, before)
    assert np.flatnonzero(canaries.scores).tolist() == [4, 5, 6, 7]
    assert every.shape == (40,)


@pytest.mark.slow
def test_a_missing_clip_is_refuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "shares", lambda _squares, parts, _clip: parts)
    assert audited(tmp_path).refuted


@pytest.mark.slow
def test_a_right_run_is_not_refuted_and_halved_noise_passes_the_bound_and_doubles_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says of sampled examples."""
    right = audited(tmp_path / "right")
    monkeypatch.setattr(local, "own_multiplier", lambda asked, examples: own_multiplier(asked, examples) / 2)
    found = audited(tmp_path / "half")
    for each in (right, found):
        assert each.claim == pytest.approx(3.0, abs=0.01)
        assert each.bound_gaussian is None
        assert len(each.turns[0]) == 0
        assert not each.refuted
    assert 0 < right.bound < right.claim
    assert right.estimate is not None
    assert found.estimate is not None
    assert 0.5 < right.estimate < right.claim
    assert found.estimate > 1.5 * right.estimate


def test_the_gaussian_s_curve_is_asked_for_where_every_step_takes_all_examples() -> None:
    assert not is_gaussian(experiment())
    assert is_gaussian(experiment(**{"training.batch_size": "full"}))
