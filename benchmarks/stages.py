"""The stages of a run: functions of FedVeil, timed from outside while it runs.

Time counts for the innermost stage: training inside an exchange of messages is training.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

REST = "rest"  # of the round loop: rows, checks, conversions
STAGES = {
    "fedveil.server.exchange:exchange": "messages",
    "fedveil.models.local.training:train_clients": "train",
    "multiprocessing.connection:wait": "train",  # the round waits here for worker processes that train
    "fedveil.core.record.record:Record.append": "record",
    "fedveil.server.checkpoint:save_state": "checkpoint",
}
STRATEGY = {"train_messages": "configure", "aggregate": "aggregate"}  # methods of the strategy in use
NAMES = ("configure", "messages", "train", "aggregate", "record", "checkpoint", REST)


class StageClock:
    """A clock of the seconds in each stage since the last `take`; time in no stage is the rest."""

    def __init__(self) -> None:
        self._stack = [REST]
        self._since = time.perf_counter()
        self._seconds = dict.fromkeys(NAMES, 0.0)

    def take(self) -> dict[str, float]:
        """Return the seconds in each stage since the last call, and start again."""
        self._switch()
        taken, self._seconds = self._seconds, dict.fromkeys(NAMES, 0.0)
        return taken

    def _switch(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Wrap a function so that its time counts for `stage`."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return wrapper

    def install(self) -> None:
        """Time the functions of STAGES from now on, in this process, wherever FedVeil has imported them."""
        for place, stage in STAGES.items():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            function = getattr(owner, name)
            _replace(owner, name, function, self.timed(function, stage))
        strategies = importlib.import_module("fedveil.server.strategies")
        make = strategies.make

        def make_timed(*args: Any) -> Any:
            strategy = make(*args)
            for name, stage in STRATEGY.items():
                function = getattr(type(strategy), name)
                _replace(type(strategy), name, function, self.timed(function, stage))
            return strategy

        _replace(strategies, "make", make, make_timed)


def _replace(owner: Any, name: str, function: Any, by: Any) -> None:
    """Replace a function by `by`, in its owner and wherever FedVeil has imported it."""
    setattr(owner, name, by)
    for module in [module for key, module in sys.modules.items() if key.startswith("fedveil.")]:
        for alias in [alias for alias, value in vars(module).items() if value is function]:
            setattr(module, alias, by)
