"""Clipping of each example's gradient: the factors that shorten it (Abadi et al. 2016, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(squares: Tensor, parts: Tensor, clip: float) -> Tensor:
    """Return the factor of each example's gradient g in a sum: its part of the sum, times min(1, clip / |g|).

    squares: |g|^2, finite; it is overwritten

    The bound is lowered by the rounding of a norm, so that no gradient stays longer than `clip`.
    """
    bound = clip * (1 - 16 * torch.finfo(squares.dtype).eps)
    return squares.rsqrt_().mul_(bound).clamp_(max=1.0).mul_(parts)


def without_bad(values: Tensor, good: Tensor) -> Tensor:
    """Return values [k, b, ...] with a client's first good example in the place of those that are not good.

    A client without any good example keeps its values.
    """
    first = good.to(torch.uint8).argmax(1, keepdim=True)  # [k, 1]
    own = torch.arange(good.shape[1], device=good.device).expand_as(good)
    places = torch.where(good, own, first)
    return values[torch.arange(len(good), device=good.device).unsqueeze(1), places]
