"""The names outside Flower's public interface that simulations use (Flower 1.41)."""

from __future__ import annotations

from flwr.common.config import flatten_dict  # flattens an app's run config as `flwr run` does
from flwr.common.constant import SUPERLINK_NODE_ID as SERVER  # by which messages name the server
from flwr.supercore.run import Run  # the type of `Grid.run`
from flwr.supercore.utils import get_flwr_home  # the folder of a user's connections

MANAGER = "flwr.server.client_manager"  # in which servers of the older interface wait for clients

__all__ = ["MANAGER", "SERVER", "Run", "flatten_dict", "get_flwr_home"]
