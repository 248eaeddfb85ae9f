"""Losses: the mean over a batch for autograd, and the losses of single predictions with their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(outputs: Tensor, labels: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """Return the mean loss over the predictions of a batch, a scalar.

    outputs: logits [n, classes], or [n, 1], the logit of the second of two classes; with a mask [n, t, vocabulary]
    labels: int64 [n]; with a mask [n, t]
    kind: `cross_entropy`, or `squared_error`: the squared distance of the probabilities (softmax or sigmoid) to the
        one-hot label, or to 0 or 1 where there is one logit
    mask: bool [n, t], the positions that count; where none does, the loss is 0
    """
    if mask is not None:
        outputs, labels = outputs[mask], labels[mask]  # [m, vocabulary], [m]
        if len(labels) == 0:
            return outputs.sum()  # 0, with a gradient of 0; the mean would be NaN
    if outputs.shape[1] == 1:
        logits, truth = outputs[:, 0], labels.to(outputs.dtype)
        if kind == "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, truth)
        return F.mse_loss(torch.sigmoid(logits), truth)
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, labels)
    truth = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)
    return (outputs.softmax(dim=1) - truth).square().sum(dim=1).mean()


def losses_and_slopes(outputs: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the loss of each prediction, [...], and its gradient with respect to the outputs, in their shape.

    outputs: logits [..., classes] or [..., 1], as for `loss`; labels: int64 [...]
    No mean is taken: the caller weighs the predictions, with 0 for those that do not count.
    """
    if outputs.shape[-1] == 1:
        logits, truth = outputs.squeeze(-1), labels.to(outputs.dtype)
        share = torch.sigmoid(logits)
        if kind == "cross_entropy":
            return F.softplus(logits) - truth * logits, (share - truth).unsqueeze(-1)
        off = share - truth
        return off.square(), (2 * off * share * (1 - share)).unsqueeze(-1)
    labels = labels.unsqueeze(-1)
    if kind == "cross_entropy":
        below = outputs - outputs.amax(-1, keepdim=True)
        shares = below.exp()  # PyTorch's softmax takes twice as long for few classes
        total = shares.sum(-1, keepdim=True)
        values = total.log() - below.gather(-1, labels)
        return values.squeeze(-1), shares.div_(total).scatter_add_(-1, labels, _minus_one(shares, labels))
    shares = outputs.softmax(-1)
    off = shares.scatter_add(-1, labels, _minus_one(shares, labels))
    inner = off * shares
    return off.square().sum(-1), 2 * (inner - shares * inner.sum(-1, keepdim=True))


def _minus_one(like: Tensor, labels: Tensor) -> Tensor:
    return like.new_full((), -1.0).expand(labels.shape)
