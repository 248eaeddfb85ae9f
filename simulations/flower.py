"""What simulations need of Flower beyond its public interface (Flower 1.41)."""

from __future__ import annotations

from flwr.common.config import flatten_dict  # of an app's run config, as `flwr run` flattens it
from flwr.supercore.run import Run  # what a `Grid` must have as `run`
from flwr.supercore.utils import get_flwr_home  # where a user's connections are configured

__all__ = ["Run", "flatten_dict", "get_flwr_home"]
