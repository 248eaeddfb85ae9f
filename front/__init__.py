"""FedVeil: federated learning that a person can run, deploy and attack.

>>> from fedveil import Experiment, run
>>> result = run(Experiment.preset("digits"))
>>> result.metrics.tail(1), result.model, result.run_dir
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Before Flower is imported anywhere: no message leaves a machine unless a user sends it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

__all__ = [
    "DataError",
    "Experiment",
    "FedveilError",
    "Interrupted",
    "Result",
    "SettingsError",
    "TrainingError",
    "__version__",
    "resume",
    "run",
]

if TYPE_CHECKING:
    from fedveil.core.errors import DataError, FedveilError, Interrupted, SettingsError, TrainingError
    from fedveil.core.settings.experiment import Experiment
    from fedveil.simulations.result import Result
    from fedveil.simulations.run import resume, run

    __version__: str

# Loaded when first used: `import fedveil` must not cost PyTorch's and Flower's imports.
_HOMES = {
    "DataError": "fedveil.core.errors",
    "FedveilError": "fedveil.core.errors",
    "Interrupted": "fedveil.core.errors",
    "SettingsError": "fedveil.core.errors",
    "TrainingError": "fedveil.core.errors",
    "Experiment": "fedveil.core.settings.experiment",
    "Result": "fedveil.simulations.result",
    "resume": "fedveil.simulations.run",
    "run": "fedveil.simulations.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it; the version is the installed package's."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("fedveil")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedveil' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
