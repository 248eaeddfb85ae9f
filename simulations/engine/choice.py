"""The choice of the engine: for `engine = "auto"`, the fastest one for a network and a device."""

from __future__ import annotations

from joblib import cpu_count

from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.models.networks.build import example
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.rules import layers
from fedveil.models.vectorized.text_layers import Recurrent
from fedveil.server.federation import Federation
from fedveil.simulations.engine.ray import check_ray
from fedveil.simulations.engine.workers import can_fork

ASKED = "as its settings say"


def choose(federation: Federation) -> tuple[str, str]:
    """Return the engine to use, and the reason in words; raise SettingsError where the one asked for cannot be used.

    `auto` takes the engine that was measured to be the fastest (docs/performance.md): all clients at once for dense
    layers, whose rules record no graph and multiply once for many clients; on a CPU one by one for other layers.
    """
    experiment, device = federation.experiment, federation.device.type
    asked = experiment.engine
    if asked == "ray":
        check_ray(experiment.workers)
        return asked, ASKED
    workers = count_workers(experiment, device)
    if asked in ("sequential", "processes"):
        return asked, ASKED
    how = batched(federation.network, example(federation.federated.dataset.task).to(federation.device))
    if asked == "batched":
        if isinstance(how, str):
            raise SettingsError(f"engine = 'batched': {how}; use engine = 'processes' or 'sequential'")
        return asked, ASKED
    one_by_one = "processes" if workers > 1 else "sequential"
    if isinstance(how, str):
        return one_by_one, how
    if device == "cuda":
        return "batched", "a GPU trains many clients in the time of one"
    if isinstance(how, Chain) and not any(isinstance(rule, Recurrent) for rule in layers(federation.network) or ()):
        return "batched", "dense layers train faster with all clients at once"
    kind = "an LSTM trains" if isinstance(how, Chain) else "layers of your own train"
    return one_by_one, f"on a CPU {kind} as fast one by one"


def count_workers(experiment: Experiment, device: str) -> int:
    """Return the number of processes that compute; raise SettingsError where the setting cannot be met."""
    asked = experiment.workers
    if asked is None:
        return 1 if device == "cuda" or experiment.engine == "sequential" or not can_fork() else int(cpu_count())
    refusals = {
        "engine = 'sequential' computes in this process alone; use engine = 'processes'": experiment.engine
        == "sequential",
        "device = 'cuda': one process keeps the GPU busy": device == "cuda",
        "this system cannot fork processes safely (Linux can)": not can_fork(),
    }
    for reason, refused in refusals.items():
        if asked > 1 and refused:
            raise SettingsError(f"workers = {asked}: {reason}")
    return asked
