"""The names of 0.1.0 for what stands in core/settings now; goes when all branches are merged."""

from fedveil.core.settings.choice import Model
from fedveil.core.settings.experiment import Experiment, known_keys, parse_assignments, resumable
from fedveil.core.settings.sections import Data, Federation, Privacy, Training

__all__ = [
    "Data",
    "Experiment",
    "Federation",
    "Model",
    "Privacy",
    "Training",
    "known_keys",
    "parse_assignments",
    "resumable",
]
