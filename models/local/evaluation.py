"""Evaluation of a model on examples, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples
from fedveil.core.metrics import Scores, Statistic, Sums, add, auc, counts
from fedveil.core.randomness import Stream, torch_random
from fedveil.models import parameters as weights
from fedveil.models.computing import memory_for
from fedveil.models.local.inputs import compute, device_of, to_tensor
from fedveil.models.local.losses import loss


def evaluate(
    network: nn.Module,
    parameters: Mapping[str, Tensor] | None,
    examples: Examples,
    loss_kind: str,
    batch: int = 1000,
    statistics: Sequence[Statistic] = (counts,),
) -> Scores:
    """Evaluate the network on `examples`, about `batch` predictions at a time.

    parameters: the weights to evaluate; None: the network's
    loss_kind: `training.loss`
    statistics: the sums to compute, see `core/metrics.py`
    The network and the global random states are restored. A network that draws random numbers in evaluation draws the
    same ones every time. Raise DataError where there are no examples, or the weights are of another network;
    TrainingError where a GPU lacks memory.
    """
    if examples.predictions == 0:
        raise DataError("there are no examples to evaluate on; check the data settings (data.validation_fraction)")
    device = device_of(network)
    rows = batch if examples.mask is None else max(1, batch // examples.mask.shape[1])
    total, margins = 0.0, []
    sums: Sums = {}
    with (
        weights.kept(network),
        torch.no_grad(),
        torch_random(Stream(0), "evaluation", cuda=device.type == "cuda"),
        memory_for(f"evaluation, with {min(rows, len(examples)):,} examples at a time,"),
    ):
        if parameters is not None:
            weights.check_fit(network, parameters)
            weights.place(network, parameters)
        network.eval()
        for first in range(0, len(examples), rows):
            some = examples.take(slice(first, first + rows))
            labels = to_tensor(some.labels, device)
            mask = None if some.mask is None else to_tensor(some.mask, device)
            # [n, classes], [n, 1] or [n, t, vocabulary]
            outputs = compute(network, to_tensor(some.features, device), "evaluation")
            total += float(loss(outputs, labels, loss_kind, mask)) * some.predictions
            sums = add(sums, {name: n for statistic in statistics for name, n in statistic(outputs, some).items()})
            if mask is None and outputs.shape[1] <= 2:
                margins.append(_margins(outputs))
    curve = auc(np.concatenate(margins), examples.labels == 1) if margins else None
    return Scores(len(examples), total / examples.predictions, sums, curve)


def _margins(outputs: Tensor) -> np.ndarray:
    """Return the margin of the second of two classes, float64 [n], from logits [n, 2] or [n, 1]."""
    logits = outputs.double().cpu().numpy()
    ahead: np.ndarray = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return ahead
