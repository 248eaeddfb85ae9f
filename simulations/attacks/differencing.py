"""One client's update, from the sums of two runs whose cohorts differ by it (`lab/pairs.py` does the arithmetic)."""

from __future__ import annotations

from fedveil.core.randomness import Stream
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters


def read(observation: Observation, _known: Known, _stream: Stream) -> Parameters:
    """Return the update that the observer's difference is."""
    assert observation.update is not None  # `needs` asks for it
    return observation.update


def warn(observation: Observation, _known: Known) -> str | None:
    """Return what will spoil the difference, or None: what differs of other clients does not cancel."""
    if observation.clients > 1:
        return f"the cohorts differ by {observation.clients} clients, whose updates are read as one"
    if observation.observer == "two-deployed-runs":
        return (
            "clients of both cohorts drew orders, dropout and noise anew, and cancel only as far as those do not matter"
        )
    return None


DIFFERENCING = Attack(
    run=read,
    recovers="update",
    needs=("update", "two runs"),
    warn=warn,
    observer="two-runs",
    cost="milliseconds",
    cites="Denning, Denning and Schwartz 1979, The Tracker",
)
