"""What the rounds of a run have cost and shown: what a protection took, and what noise must cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.accounting import Shown
from fedveil.server.checkpoint import Parameters, State
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round


class Accounting(Observer):
    """Counts, in the run's state, what protection and noise are accounted for."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        protected: bool,
        inspect: Callable[[Parameters, Sequence[int]], float] | None = None,
    ) -> None:
        """`protected`: updates are; `inspect`: how far a model lies from the plain mean of its clients' weights."""
        self._noisy, self._protected, self._inspect = experiment.privacy.noisy, protected, inspect

    def begun(self, current: Round, state: State) -> None:
        """Count whom a round asks, of how many: what answers may be seen, and is never unseen."""
        if self._noisy:
            for client in current.asked:
                state.asked[client] = state.asked.get(client, 0) + 1
            state.population = min(state.population or current.population, current.population)
            state.drawn = max(state.drawn, len(current.asked))

    def aggregated(self, current: Round, state: State) -> None:
        """Count who is in a sum, and what protecting it cost."""
        answered = current.trained.answered
        if self._noisy:
            state.fewest = min(state.fewest or len(answered), len(answered))
        if self._protected:
            error = self._inspect(current.mean or current.aggregate, answered) if self._inspect else None
            _add_costs(state.costs, current, error)


def shown(state: State) -> Shown:
    """Return what a run with noise has shown so far."""
    return Shown(state.round, max(state.asked.values(), default=0), state.fewest, state.population, state.drawn)


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
