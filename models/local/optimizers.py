"""The local optimisers, new for every client and round.

They are the functional forms of `torch.optim`, one call for all weights. Their state is passed in, so that clients
trained together share one optimiser. Unlike the classes, they do not import PyTorch's compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedveil.core.settings.sections import Training


class Optimizer:
    """SGD, Adam or AdamW, with its state for each weight between steps."""

    def __init__(self, settings: Training, learning_rate: float) -> None:
        self._settings, self._rate = settings, learning_rate
        self._first: dict[int, Tensor] = {}  # momentum, or the mean of gradients
        self._second: dict[int, Tensor] = {}  # the mean of squared gradients
        self._taken: dict[int, Tensor] = {}  # steps

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Update `weights` in place; a weight whose gradient is None keeps its value and state.

        Where the first dimension is clients, a later call may pass the first k clients alone; the others' state is
        dropped.
        """
        given = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        trained = [weights[i] for i in given]
        settings, slopes = self._settings, list(given.values())
        first = self._recall(self._first, given) if settings.momentum or settings.optimizer != "sgd" else []
        if settings.optimizer == "sgd":
            momentum: list[Tensor | None] = [*first] or [None] * len(given)
            sgd(
                trained, slopes, momentum, fused=True, lr=self._rate, momentum=settings.momentum, dampening=0.0,
                weight_decay=settings.weight_decay, nesterov=settings.nesterov, maximize=False,
            )  # fmt: skip
            return
        second = self._recall(self._second, given)
        for i, gradient in given.items():
            self._taken.setdefault(i, torch.zeros((), device=gradient.device))
        (adam if settings.optimizer == "adam" else adamw)(
            trained, slopes, first, second, [], [self._taken[i] for i in given], fused=True, amsgrad=False,
            lr=self._rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=settings.weight_decay, maximize=False,
        )  # fmt: skip

    @staticmethod
    def _recall(memory: dict[int, Tensor], given: dict[int, Tensor]) -> list[Tensor]:
        for i, gradient in given.items():
            if i not in memory:
                memory[i] = torch.zeros_like(gradient)
            elif memory[i].shape != gradient.shape:
                memory[i] = memory[i][: len(gradient)]
        return [memory[i] for i in given]
