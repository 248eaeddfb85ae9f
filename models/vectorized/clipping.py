"""Clipping of each example's gradient: the factors that shorten it (Abadi et al. 2016, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(squares: Tensor, good: Tensor, clip: float) -> Tensor:
    """Return the factor min(1, clip / |g|) of each example's gradient in a sum, 0 for those that do not count.

    squares: |g|^2; good: which examples count, bool in the same shape

    The bound is lowered by the rounding of a norm, so that no gradient stays longer than `clip`.
    """
    bound = clip * (1 - 16 * torch.finfo(squares.dtype).eps)
    return torch.where(good, (bound / squares.sqrt()).clamp_(max=1.0), 0.0)


def without_bad(values: Tensor, good: Tensor) -> Tensor:
    """Return values [k, b, ...] with a client's first good example in the place of those that are not good.

    A client without any good example keeps its values.
    """
    first = good.to(torch.uint8).argmax(1, keepdim=True)  # [k, 1]
    own = torch.arange(good.shape[1], device=good.device).expand_as(good)
    places = torch.where(good, own, first)
    return values[torch.arange(len(good), device=good.device).unsqueeze(1), places]
