"""The name of 0.1.0 for the catalog; goes when all branches are merged."""

from fedveil.core.catalog import ATTACKS, DATASETS, DEFENCES, MODELS, PARTITIONS, PRESETS, PROTECTIONS, STRATEGIES

__all__ = ["ATTACKS", "DATASETS", "DEFENCES", "MODELS", "PARTITIONS", "PRESETS", "PROTECTIONS", "STRATEGIES"]
