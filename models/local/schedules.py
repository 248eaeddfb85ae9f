"""The learning rate of each round, by the schedules of `torch.optim.lr_scheduler`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import lr_scheduler

from fedveil.core.settings.sections import Training


class Schedule:
    """The clients' learning rate over rounds; read `rate` before a round and `advance` after it.

    >>> schedule = Schedule(Training(learning_rate=0.1, schedule="exponential", schedule_factor=0.5), rounds=2)
    >>> schedule.advance(train_loss=1.0)
    >>> schedule.rate
    0.05
    """

    def __init__(self, settings: Training, rounds: int) -> None:
        """Make the schedule of a run.

        rounds: the number of the run's rounds, after which `cosine` reaches its minimum
        """
        self._constant = settings.learning_rate if settings.schedule == "constant" else None
        if self._constant is None:  # making an optimiser imports PyTorch's compiler, which takes seconds
            self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)  # only holds the rate
            self._scheduler = _scheduler(self._optimizer, settings, rounds)

    @property
    def rate(self) -> float:
        """The learning rate of the next round."""
        if self._constant is not None:
            return self._constant
        return float(self._optimizer.param_groups[0]["lr"])

    def advance(self, train_loss: float) -> None:
        """Advance by one round, whose mean training loss was `train_loss`, which `plateau` uses."""
        if self._constant is not None:
            return
        self._optimizer.step()  # schedulers warn without it
        if isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(train_loss)
        else:
            self._scheduler.step()


def replay(settings: Training, rounds: int, losses: Iterable[float]) -> Schedule:
    """Return the schedule after rounds with the training losses `losses`, to resume a run."""
    schedule = Schedule(settings, rounds)
    for train_loss in losses:
        schedule.advance(train_loss)
    return schedule


def _scheduler(
    optimizer: torch.optim.Optimizer, settings: Training, rounds: int
) -> lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau:
    period, factor, minimum = settings.schedule_rounds, settings.schedule_factor, settings.schedule_minimum
    match settings.schedule:
        case "step":
            return lr_scheduler.StepLR(optimizer, period, factor)
        case "exponential":
            return lr_scheduler.ExponentialLR(optimizer, factor)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, rounds, minimum)
        case "cyclic":
            return lr_scheduler.CyclicLR(optimizer, minimum, settings.learning_rate, period, cycle_momentum=False)
        case "plateau":
            return lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=period, min_lr=minimum)
    raise AssertionError(settings.schedule)  # a constant rate has no scheduler
