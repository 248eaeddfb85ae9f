"""Norms of each example's own gradient, for layers that meet an example at several positions.

Such a gradient is a sum over positions, and positions may cancel: the norm of the sum is wanted, not the sum of norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 22  # numbers in memory for examples that are computed at once, 16 MiB in float32


def factored(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each example's values by its factor: [k, b * t, ...] or [k, b, ...] by [k, b], in the values' shape."""
    if values.dim() == 3 and values.shape[1] == factors.shape[1]:
        return values * factors.unsqueeze(-1)
    k, b = factors.shape
    return (values.reshape(k, b, -1) * factors.unsqueeze(-1)).view(values.shape)


def squared_norms(values: Tensor) -> Tensor:
    """Return |values|^2 over the last dimension, without memory for the squares."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.square_()


def sequence_squares(inputs: Tensor, slopes: Tensor) -> Tensor:
    """Return |sum_t slope_t input_t^T|^2 of each example, [b].

    inputs: [b, t, in]; slopes: [b, t, out]

    By the cheaper of two ways: the gradients themselves, or sum_{t, s} <slope_t, slope_s> <input_t, input_s> (Li et al.
    2022, section 4). In the latter large terms may cancel, so the bound on its rounding is added: no norm comes out
    too small.
    """
    b, t, wide = inputs.shape
    out = slopes.shape[-1]
    by_pairs = t * (wide + out) < wide * out
    at_once = max(1, BLOCK // (2 * t * t if by_pairs else wide * out))
    found = inputs.new_empty(b)
    for start in range(0, b, at_once):
        block = slice(start, start + at_once)
        x, s = inputs[block], slopes[block]
        if by_pairs:
            pairs = torch.bmm(s, s.transpose(1, 2)).mul_(torch.bmm(x, x.transpose(1, 2)))
            lengths = pairs.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)  # sum_t |slope_t| |input_t|
            error = 8 * torch.finfo(x.dtype).eps * lengths.square()
            torch.add(pairs.sum((1, 2)).clamp_(min=0), error, out=found[block])
        else:
            torch.sum(torch.bmm(s.transpose(1, 2), x).square_(), (1, 2), out=found[block])
    return found


def word_slots(words: Tensor, padding: int) -> Tensor:
    """Number the different words of each text: int64 [..., t] -> int64 [..., t], equal where words are, from 0 to t - 1.

    Padding gets the number t.
    """
    ordered, order = words.sort(-1)
    steps = torch.zeros_like(words)
    torch.ne(ordered[..., 1:], ordered[..., :-1], out=steps[..., 1:])
    slots = torch.empty_like(words).scatter_(-1, order, steps.cumsum(-1))
    return slots.masked_fill_(words == padding, words.shape[-1])
