"""The choice of the engine: for `engine = "auto"`, the fastest one for a network and a device."""

from __future__ import annotations

from functools import partial

from joblib import cpu_count
from torch import Tensor, nn

from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.models.computing import repeatable
from fedveil.models.networks.build import example
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.rules import layers
from fedveil.models.vectorized.text_layers import Recurrent
from fedveil.server.federation import Federation
from fedveil.simulations.engine.forks import can_fork, children_train, in_child, sees_gpu
from fedveil.simulations.engine.ray import check_ray

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
    inputs = example(federation.federated.dataset.task).to(federation.device)
    way, reason = _way(federation.network, inputs, on_cpu=device == "cpu")
    if asked == "batched":
        if way is None:
            raise SettingsError(f"engine = 'batched': {reason}; use engine = 'processes' or 'sequential'")
        return asked, ASKED
    one_by_one = "processes" if workers > 1 else "sequential"
    if way is None:
        return one_by_one, reason
    if device == "cuda":
        return "batched", "a GPU trains many clients in the time of one"
    if way is Chain and not any(isinstance(rule, Recurrent) for rule in layers(federation.network) or ()):
        return "batched", "dense layers train faster with all clients at once"
    kind = "an LSTM trains" if way is Chain else "layers of your own train"
    return one_by_one, f"on a CPU {kind} as fast one by one"


def _way(network: nn.Module, inputs: Tensor, *, on_cpu: bool) -> tuple[type | None, str]:
    """Return the kind of `batched`'s way to compute all clients at once, or None and the reason why there is none.

    On a CPU beside a GPU a child tries it: after a backward pass here, worker processes could not train.
    """
    try_it = partial(_try, network, inputs)
    found = in_child(try_it) if on_cpu and sees_gpu() and children_train() else None
    return found or try_it()


def _try(network: nn.Module, inputs: Tensor) -> tuple[type | None, str]:
    with repeatable(inputs.device):
        how = batched(network, inputs)
    return (None, how) if isinstance(how, str) else (type(how), "")


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
