"""Canaries: clients whose updates are known, each in or out by a coin, and their scores from what a run released.

Each has numbers of the model of its own, drawn at random over all tensors, with random signs. So canaries do not hide
each other, noise that misses a tensor is seen, and so is a clip that takes tensors one by one. Their updates are
`TOO_LONG` times what the clip allows, so that it matters. One that is out answers with the model that it was given,
whose update is zero: neighbours as the accounting has them.

Most take part in all rounds that ask them. Some (`turns`) only in odd ones, and their score is the mean of odd rounds less
that of even ones: noise that is drawn once and used again cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedveil.client.learning.contribution import Contributions
from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream

TOO_LONG = 10.0
TURNS = 5  # one canary in so many takes turns


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of a run, the clients from number `first` on.

    included: bool [m], the coins; turns: bool [m], those that take part in odd rounds only
    places: int64 [m, w], the numbers of each canary in the model as one vector; parts: float64 [m, w], its direction
    there, of norm 1; length: the norm of its update before it is clipped
    mixing: float64 [rounds, rounds], the matrix C by which noise of the rounds becomes independent; of independent noise 1
    told: float64 [rounds, m], how far each round moved along each canary's direction, as far as rounds were seen
    asked: bool [rounds, m], whether a round may hold an update of a canary
    """

    first: int
    included: np.ndarray
    turns: np.ndarray
    places: np.ndarray
    parts: np.ndarray
    length: float
    mixing: np.ndarray
    told: np.ndarray = field(init=False)
    asked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.mixing), len(self.included))
        object.__setattr__(self, "told", np.zeros(shape))
        object.__setattr__(self, "asked", np.zeros(shape, bool))

    @classmethod
    def draw(
        cls, number: int, first: int, rounds: int, size: int, clip: float, seed: int, mixing: np.ndarray | None = None
    ) -> Canaries:
        """Draw `number` canaries for a model of `size` numbers, by the seed's own streams.

        Raise SettingsError where the model has fewer numbers than there are canaries.
        """
        if number > size:
            raise SettingsError(
                f"--canaries {number}: each has a number of the model of its own, and it has {size:,}; take fewer"
            )
        width = size // number
        stream = Stream(seed)
        places = stream.generator("audit places").permutation(size)[: number * width].reshape(number, width)
        signs = stream.generator("audit signs").choice([-1.0, 1.0], (number, width))
        included = stream.generator("audit coins").random(number) < 0.5
        turns = (np.arange(number) % TURNS == 0) & (rounds > 1)
        mixing = np.eye(rounds) if mixing is None else mixing
        return cls(first, included, turns, places, signs / np.sqrt(width), TOO_LONG * clip, mixing)

    def __call__(self, contributions: Contributions) -> None:
        """Replace the canaries' updates: as a simulation's adversary, before they are clipped."""
        found = [(k, client - self.first) for k, client in contributions.standing() if client >= self.first]
        if not found:
            return
        rows, canaries = np.array(found).T
        there = (self.included & (~self.turns | (contributions.instructions.round % 2 == 1)))[canaries]
        end = 0
        for name, given in contributions.given.items():
            start, end = end, end + given.size
            weights = contributions.weights[name]
            weights[rows] = given
            places = self.places[canaries]
            which, part = np.nonzero((places >= start) & (places < end) & there[:, None])
            flat = weights.reshape(len(weights), -1)
            assert flat.base is not None  # a view: what is added below is added to the contributions
            flat[rows[which], places[which, part] - start] += self.length * self.parts[canaries[which], part]

    def see_model(
        self,
        number: int,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
        asked: Sequence[int] | None = None,
    ) -> None:
        """Note what the models before and after a round tell of every canary.

        asked: the round's clients, where who sees the models knows them: of others the round tells nothing
        """
        self.told[number - 1] = np.sum(_moved(before, after)[self.places] * self.parts, axis=1)
        everyone = np.arange(len(self.included)) + self.first
        self.asked[number - 1] = True if asked is None else np.isin(everyone, asked)

    def see_update(
        self, number: int, client: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> None:
        """Note what one client's own answer tells, where it is a canary."""
        i = client - self.first
        if i >= 0:
            self.told[number - 1, i] = float(_moved(before, after)[self.places[i]] @ self.parts[i])
            self.asked[number - 1, i] = True

    @property
    def scores(self) -> np.ndarray:
        """The canaries' scores, float64 [m], higher where one seems to be in.

        Of canaries that take turns the mean of odd rounds less that of even ones; of others the mean of rounds that asked
        them, or where noise of the rounds depends on each other, what tells most beside it: (C a)' (C y) for y as told,
        and a as asked.
        """
        odd = np.arange(len(self.told)) % 2 == 0
        asked = self.mixing.T @ self.mixing @ self.asked
        steady = np.sum(asked * self.told, axis=0) / np.maximum(self.asked.sum(0), 1)
        turned = self.told[odd].mean(0) - (self.told[~odd].mean(0) if len(self.told) > 1 else 0.0)
        found: np.ndarray = np.where(self.turns, turned, steady)
        return found

    @property
    def lost(self) -> float:
        """How many times less the scores of canaries that take turns stand out from noise than those of the others."""
        rounds = len(self.told)
        odd, even = (rounds + 1) // 2, rounds // 2
        return float(np.sqrt(rounds * (1 / odd + 1 / max(even, 1))))


def _moved(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.subtract(after[name], v, dtype=np.float64).reshape(-1) for name, v in before.items()])
