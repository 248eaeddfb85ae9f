"""The names outside Flower's public interface that simulations use (Flower 1.41)."""

from __future__ import annotations

from flwr.common.config import flatten_dict  # flattens an app's run config as `flwr run` does
from flwr.supercore.run import Run  # the type of `Grid.run`
from flwr.supercore.utils import get_flwr_home  # the folder of a user's connections

__all__ = ["Run", "flatten_dict", "get_flwr_home"]
