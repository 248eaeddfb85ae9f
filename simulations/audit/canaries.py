"""Canaries: clients whose updates are known, each in or out by a coin, and their scores from what a run released.

Each has numbers of the model of its own, drawn at random over all tensors, with random signs. So canaries do not hide
each other, noise that misses a tensor is seen, and so is a clip that takes tensors one by one. Their updates are
`TOO_LONG` times what the clip allows, so that it matters. One that is out answers with the model that it was given,
whose update is zero: neighbours as the accounting has them.

Most take part in all rounds. Some (`turns`) only in odd ones, and their score is the mean of odd rounds less that of
even ones: noise that is drawn once and used again cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    rounds: of the run
    included: bool [m], the coins; turns: bool [m], those that take part in odd rounds only
    places: int64 [m, w], the numbers of each canary in the model as one vector; parts: float64 [m, w], its direction
    there, of norm 1; length: the norm of its update before it is clipped
    scores: float64 [m], as the rounds so far leave them
    """

    first: int
    rounds: int
    included: np.ndarray
    turns: np.ndarray
    places: np.ndarray
    parts: np.ndarray
    length: float
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", np.zeros(len(self.included)))

    @classmethod
    def draw(cls, number: int, first: int, rounds: int, size: int, clip: float, seed: int) -> Canaries:
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
        return cls(first, rounds, included, turns, places, signs / np.sqrt(width), TOO_LONG * clip)

    def __call__(self, contributions: Contributions) -> None:
        """Replace the canaries' updates: as a simulation's adversary, before they are clipped."""
        found = [(k, client - self.first) for k, client in contributions.standing() if client >= self.first]
        if not found:
            return
        rows, canaries = np.array(found).T
        out = ~self._takes_part(contributions.instructions.round)[canaries]
        end = 0
        for name, given in contributions.given.items():
            start, end = end, end + given.size
            weights = contributions.weights[name]
            weights[rows] = given
            places = self.places[canaries]
            here = (places >= start) & (places < end) & ~out[:, None]
            which, part = np.nonzero(here)
            flat = weights.reshape(len(weights), -1)
            assert flat.base is not None  # a view: what is added below is added to the contributions
            flat[rows[which], places[which, part] - start] += self.length * self.parts[canaries[which], part]

    def _takes_part(self, number: int) -> np.ndarray:
        """Return who takes part in a round, bool [m]."""
        return self.included & (~self.turns | (number % 2 == 1))

    def see_model(self, number: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
        """Add what the models before and after a round tell of every canary to its score."""
        moved = np.concatenate([
            np.subtract(after[name], value, dtype=np.float64).reshape(-1) for name, value in before.items()
        ])  # fmt: skip
        self.scores[:] += self._weights(number) * np.sum(moved[self.places] * self.parts, axis=1)

    def see_update(
        self, number: int, client: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> None:
        """Add what one client's own answer tells to its score, where it is a canary."""
        i = client - self.first
        if i < 0:
            return
        flat = np.concatenate([np.subtract(after[name], v, dtype=np.float64).reshape(-1) for name, v in before.items()])
        self.scores[i] += self._weights(number)[i] * float(flat[self.places[i]] @ self.parts[i])

    @property
    def lost(self) -> float:
        """How many times less the scores of canaries that take turns stand out from noise than those of the others."""
        odd, even = (self.rounds + 1) // 2, self.rounds // 2
        return float(np.sqrt(self.rounds * (1 / odd + 1 / max(even, 1))))

    def _weights(self, number: int) -> np.ndarray:
        """Return the weight of a round in the scores, float64 [m]."""
        odd, even = (self.rounds + 1) // 2, self.rounds // 2
        turned = 1 / odd if number % 2 else -1 / max(even, 1)
        return np.where(self.turns, turned, 1 / self.rounds)
