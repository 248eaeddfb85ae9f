"""Canaries are clients like all others but for their updates, which are what the slow telling says, one by one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedveil import Experiment, SettingsError, run
from fedveil.client.learning.contribution import Contributions, Instructions
from fedveil.datasets.federated import load
from fedveil.privacy.dp.banded import BandedNoise
from fedveil.server.checkpoint import State
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round
from fedveil.simulations.audit.canaries import TOO_LONG, TURNS, Canaries
from fedveil.simulations.audit.run import USUAL, mixing_of, with_canaries

ALL = {**USUAL, "federation.cohort": 10}

SHAPES = {"weight": (4, 5), "bias": (4,)}
SIZE = 24


def drawn(number: int = 10, rounds: int = 4, clip: float = 2.0) -> Canaries:
    return Canaries.draw(number, 3, rounds, SIZE, clip, 0)


def directions(canaries: Canaries) -> np.ndarray:
    """Every canary's direction as one vector: [m, SIZE]."""
    found = np.zeros((len(canaries.included), SIZE))
    for i, (places, parts) in enumerate(zip(canaries.places, canaries.parts, strict=True)):
        found[i, places] = parts
    return found


def changed(canaries: Canaries, clients: list[int], number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the model was, what clients had trained, and what they answer with: [SIZE], [K, SIZE], [K, SIZE]."""
    rng = np.random.default_rng(number)
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights = {name: rng.standard_normal((len(clients), *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    trained = np.concatenate([value.reshape(len(clients), -1) for value in weights.values()], 1)
    instructions = Instructions(number, 0.1, None, False, b"", 0, {})
    canaries(Contributions(clients, instructions, given, weights))
    after = np.concatenate([value.reshape(len(clients), -1) for value in weights.values()], 1)
    return np.concatenate([value.ravel() for value in given.values()]), trained, after


def test_directions_have_norm_one_and_no_number_in_common() -> None:
    found = directions(drawn())
    assert found @ found.T == pytest.approx(np.eye(10))
    assert np.unique(drawn().places).size == 20


def test_coins_are_fair_and_places_and_coins_follow_from_the_seed() -> None:
    many = Canaries.draw(4000, 0, 4, 8000, 1.0, 7)
    assert abs(many.included.mean() - 0.5) < 0.03
    again = Canaries.draw(4000, 0, 4, 8000, 1.0, 7)
    assert (many.included == again.included).all()
    assert (many.places == again.places).all()
    assert (many.included != Canaries.draw(4000, 0, 4, 8000, 1.0, 8).included).any()


@pytest.mark.parametrize("number", [1, 2])
def test_a_canary_answers_with_its_direction_beyond_the_clip_or_with_no_update_and_others_with_theirs(number) -> None:
    canaries = drawn()
    clients = [5, 0, 12, 2, 3, 4, 7, 8, 11, 6]
    given, trained, after = changed(canaries, clients, number)
    vectors = directions(canaries)
    for k, client in enumerate(clients):
        i = client - 3
        if i < 0:
            assert (after[k] == trained[k]).all()
            continue
        there = canaries.included[i] and (number == 1 or not canaries.turns[i])
        wanted = given + (TOO_LONG * 2.0 * vectors[i] if there else 0.0)
        assert after[k] == pytest.approx(wanted, abs=1e-5)


def seen(canaries: Canaries, rounds: int, asked: list[list[int]] | None = None) -> np.ndarray:
    """What random rounds tell along each direction: [m, rounds]."""
    rng = np.random.default_rng(1)
    moves = rng.standard_normal((rounds, SIZE))
    before = {"weight": np.zeros((4, 5)), "bias": np.zeros(4)}
    for t, move in enumerate(moves):
        after = {"weight": move[:20].reshape(4, 5), "bias": move[20:]}
        canaries.see_model(t + 1, before, after, None if asked is None else asked[t])
    found: np.ndarray = directions(canaries) @ moves.T
    return found


def test_scores_are_the_mean_over_rounds_and_of_canaries_in_turns_odd_less_even_rounds() -> None:
    canaries = drawn(rounds=5)
    told = seen(canaries, 5)
    for i, score in enumerate(canaries.scores):
        odd_less_even = told[i, ::2].mean() - told[i, 1::2].mean()
        assert score == pytest.approx(odd_less_even if canaries.turns[i] else told[i].mean())
    assert canaries.turns.sum() == 10 // TURNS


def test_where_it_is_known_who_was_asked_other_rounds_do_not_count() -> None:
    canaries = drawn(rounds=3)
    asked = [[3, 4, 5], [4, 5, 6, 0], [5, 6, 7]]
    told = seen(canaries, 3, asked)
    for i in range(1, 5):  # the first takes turns
        rounds = [t for t, clients in enumerate(asked) if i + 3 in clients]
        assert canaries.scores[i] == pytest.approx(told[i, rounds].mean())


def test_noise_that_depends_on_earlier_rounds_is_made_independent_before_canaries_are_looked_for() -> None:
    banded = {"federation.sampling": "order", "federation.cohort": 3, "privacy.noise": "banded", "federation.rounds": 6}
    mixing = mixing_of(Experiment.preset("digits").override({**ALL, **banded}))
    generator = np.random.default_rng(0)
    fresh = {t: generator.standard_normal(7) for t in range(1, 7)}
    noise = BandedNoise(3, lambda number, _size: fresh[number])
    assert mixing @ [noise(t, 7) for t in range(1, 7)] == pytest.approx(np.array([fresh[t] for t in range(1, 7)]))
    canaries = Canaries.draw(10, 3, 6, SIZE, 2.0, 0, mixing)
    told = seen(canaries, 6, [[4], [5], [6], [4], [5], [6]])
    once = np.array([1.0, 0, 0, 1, 0, 0])  # when client 4, canary 1, is asked
    assert canaries.scores[1] == pytest.approx((mixing @ once) @ (mixing @ told[1]) / 2)


def test_a_client_s_own_answer_counts_for_its_own_score() -> None:
    canaries = drawn(rounds=1)
    before = {"weight": np.ones((4, 5)), "bias": np.ones(4)}
    after = {"weight": np.full((4, 5), 3.0), "bias": np.zeros(4)}
    canaries.see_update(1, 2, before, after)  # no canary
    canaries.see_update(1, 7, before, after)
    moved = np.concatenate([np.full(20, 2.0), np.full(4, -1.0)])
    wanted = np.zeros(10)
    wanted[4] = directions(canaries)[4] @ moved
    assert canaries.scores == pytest.approx(wanted)


def test_more_canaries_than_numbers_in_the_model_are_refused() -> None:
    with pytest.raises(SettingsError, match="has 24"):
        drawn(25)


def test_the_crowd_holds_the_clients_own_data_first_and_canaries_one_example_each() -> None:
    experiment = Experiment.preset("digits").override(ALL)
    own = load(experiment.data, experiment.seed)
    crowd = load(with_canaries(experiment, 25).data, 0)
    assert len(crowd.clients) == 35
    for client in range(10):
        assert (crowd.client(client)[0].features == own.client(client)[0].features).all()
    for client in range(10, 35):
        (one,) = crowd.client(client)[0].features
        assert (one == own.client(client % 10)[0].features[0]).all()
    everyone = np.arange(35)
    assert crowd.sizes(everyone).tolist() == [len(crowd.client(client)[0]) for client in range(35)]
    assert (crowd.counts(everyone).sum(1) == crowd.sizes(everyone)).all()
    assert (crowd.dataset.test.labels == own.dataset.test.labels).all()


def test_nothing_but_the_population_and_its_cohorts_changes() -> None:
    experiment = Experiment.preset("digits").override({**ALL, "federation.target_accuracy": 0.5})
    half = experiment.override({"federation.cohort": 5})
    old, new = (tomllib.loads(each.toml()) for each in (half, with_canaries(half, 1000)))
    assert new["federation"].pop("cohort") == 505
    old["federation"].pop("cohort")
    old["federation"].pop("target_accuracy")
    assert {name: part for name, part in new.items() if name != "data"} == {
        name: part for name, part in old.items() if name != "data"
    }
    assert with_canaries(experiment, 1000).federation.cohort == 1010


class Models(Observer):
    """Keeps how far each round moves the model."""

    def __init__(self) -> None:
        self.moves: list[np.ndarray] = []

    def finished(self, current: Round, state: State) -> None:
        pairs = [(current.aggregate[name], value) for name, value in current.model.items()]
        self.moves.append(np.concatenate([np.subtract(a, b, dtype=np.float64).ravel() for a, b in pairs]))


def test_in_a_run_each_canary_moves_the_sum_by_what_the_clip_allows(tmp_path: Path) -> None:
    """With next to no noise the sum of all clients' updates, along a canary's direction, is C where it is in, else 0."""
    next_to_none = {"privacy.clip": 0.5, "privacy.noise_multiplier": 1e-6, "model.hidden": [32]}
    experiment = Experiment.preset("digits").override({**ALL, **next_to_none, "training.learning_rate": 1e-9})
    crowd, models = with_canaries(experiment, 200), Models()
    canaries = Canaries.draw(200, 10, 4, 64 * 32 + 32 + 330, 0.5, 0)
    run(crowd, out=tmp_path / "run", adversary=canaries, observers=[models], plots=False)
    along = np.array([(canaries.parts * (210 * move)[canaries.places]).sum(1) for move in models.moves])
    for number, row in enumerate(along, start=1):
        there = canaries.included & (~canaries.turns | (number % 2 == 1))
        assert row == pytest.approx(0.5 * there, abs=2e-3)
