"""What training makes small: the losses, one number a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(outputs: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The mean loss over a batch, a scalar.

    outputs: logits [n, classes], or [n, 1], the logit of the second of two classes
    labels: int64 [n]
    kind: `cross_entropy`, or `squared_error`: the squared distance of the probabilities (softmax or sigmoid) to the
        one-hot label, or to 0 or 1 where there is one logit
    """
    if outputs.shape[1] == 1:
        logits, truth = outputs[:, 0], labels.to(outputs.dtype)
        if kind == "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, truth)
        return F.mse_loss(torch.sigmoid(logits), truth)
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, labels)
    truth = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)
    return (outputs.softmax(dim=1) - truth).square().sum(dim=1).mean()
