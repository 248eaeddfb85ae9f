"""Attacks on privacy: what an observer learns from the messages of a run, scored beside guessing.

>>> from fedveil import Experiment
>>> from fedveil.simulations.attacks import run
>>> outcome = run("words", Experiment.preset("spam-demo"), trials=5)
>>> outcome.mean()["recall"], outcome.mean(baseline=True)["recall"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Attack", "Known", "Observation", "Outcome", "measure", "run"]

if TYPE_CHECKING:
    from fedveil.simulations.attacks.lab.attack import Attack
    from fedveil.simulations.attacks.lab.lab import Outcome
    from fedveil.simulations.attacks.lab.lab import attack as run
    from fedveil.simulations.attacks.lab.matrix import measure
    from fedveil.simulations.attacks.lab.observation import Known, Observation

# Loaded when first used, as the names of `fedveil` are.
_HOMES = {
    "Attack": ("lab.attack", "Attack"),
    "Known": ("lab.observation", "Known"),
    "Observation": ("lab.observation", "Observation"),
    "Outcome": ("lab.lab", "Outcome"),
    "measure": ("lab.matrix", "measure"),
    "run": ("lab.lab", "attack"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
