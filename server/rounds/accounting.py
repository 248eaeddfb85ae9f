"""The accounts of a run: the costs of its protection, and the releases that its noise must cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.accounting.mechanisms import Shown
from fedveil.privacy.dp.adaptive import next_bound
from fedveil.server.checkpoint import Parameters, State
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round
from fedveil.server.rounds.sampling import in_turn


class Accounting(Observer):
    """Counts the costs of protection and the releases of noise in the run's state."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        protected: bool,
        inspect: Callable[[Parameters, Sequence[int]], float] | None = None,
    ) -> None:
        """Start counting.

        protected: updates are protected; inspect: returns the distance of a model from the plain mean of its clients'
        weights
        """
        self._noisy, self._protected, self._inspect = experiment.privacy.noisy, protected, inspect

    def begun(self, current: Round, state: State) -> None:
        """Count the clients that a round asks, and the population: a reply may be seen even where the round fails."""
        if self._noisy:
            for client in current.asked:
                state.asked[client] = state.asked.get(client, 0) + 1
            state.cohorts += 1
            state.population = min(state.population or current.population, current.population)
            state.drawn = max(state.drawn, len(current.asked))

    def opening(self, current: Round, clients: int, state: State) -> None:
        """Count the clients in a sum; one of none holds nothing of anybody."""
        if self._noisy and clients:
            state.fewest = min(state.fewest or clients, clients)

    def aggregated(self, current: Round, state: State) -> None:
        """Set the next round's bound, and count the costs of protection."""
        if current.clip is not None and current.within is not None:
            state.clip = next_bound(current.clip, current.within)
        if self._protected and not current.skipped:
            answered = current.trained.answered
            error = self._inspect(current.mean or current.aggregate, answered) if self._inspect else None
            _add_costs(state.costs, current, error)


def shown(state: State) -> Shown:
    """Return what a run with noise has released so far."""
    asked, rounds = max(state.asked.values(), default=0), max(state.round, state.cohorts)
    return Shown(rounds, asked, state.fewest, state.population, state.drawn, state.numbers, state.smallest)


def asked_after(experiment: Experiment, state: State, rounds: int) -> int | None:
    """Return the most rounds that one client is asked in after so many more, where cohorts are known beforehand; else None."""
    federation = experiment.federation
    if federation.sampling != "order" or experiment.privacy.epsilon is None:
        return None
    seed = state.turns or experiment.seed
    asked = Counter(state.asked)
    for number in range(state.round + 1, state.round + 1 + rounds):
        asked.update(in_turn(experiment.data.clients, federation.cohort, number, seed))
    return max(asked.values())


def _add_costs(costs: dict[str, float], current: Round, largest_error: float | None) -> None:
    """Add a protected round's costs to the run's."""
    trained = current.trained
    stages = sum(row["seconds"] or 0.0 for row in trained.ledger if row["stage"] != "train")
    costs["seal_seconds"] = costs.get("seal_seconds", 0.0) + stages
    costs["error_bound"] = max(costs.get("error_bound", 0.0), current.bound)
    for key in ("seal_seconds", "open_seconds"):
        costs[key] = costs.get(key, 0.0) + sum(row.pop(key) for row in trained.clients)
    costs["clipped"] = costs.get("clipped", 0) + sum(row["clipped"] for row in trained.clients)
    if largest_error is not None:
        costs["largest_error"] = max(costs.get("largest_error", 0.0), largest_error)
