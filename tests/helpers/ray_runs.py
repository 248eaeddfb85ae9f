"""A prepared federation, run on Ray as `fedveil run --engine ray` runs it."""

from __future__ import annotations

from typing import Any

from fedveil.client.learning.runtime import client_runtime
from fedveil.core.record.record import Record
from fedveil.server.federation import Federation
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.engine.ray import run_on_ray
from fedveil.simulations.engine.states import DiskStates
from fedveil.simulations.run import CLIENTS


def on_ray(federation: Federation, record: Record, hooks: Hooks, workers: int | None, **others: Any) -> None:
    """Run the rounds that are left with so many of this machine's processors."""
    federation.experiment = federation.experiment.override({"workers": workers})
    federation.state.clients = DiskStates(record.path(CLIENTS), federation.state.client_index)
    runtime = client_runtime(federation.experiment.toml(), states=federation.state.clients)
    run_on_ray(federation, record, hooks, runtime, **others)
