"""The mean of a cohort's weights, as Flower takes it and to the same bytes, without what Flower checks and copies on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from fedveil.core.errors import TrainingError
from fedveil.core.messages import ARRAYS, CLIENT, METRICS, from_arrays, to_arrays


def weighted_mean(contents: Sequence[RecordDict], weight: str) -> ArrayRecord:
    """sum_k n_k w_k / sum_k n_k (McMahan et al. 2017, algorithm 1), summed in float32 in the order of `contents`.

    weight: the key of n_k in each content's metrics
    Raise TrainingError where a client's arrays are not the others'.
    """
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    counts = [cast(float, m[weight]) for m in metrics]
    total = sum(counts)
    mean: dict[str, np.ndarray] = {}
    scratch: dict[str, np.ndarray] = {}
    for content, count, own in zip(contents, counts, metrics, strict=True):
        arrays = from_arrays(cast(ArrayRecord, content[ARRAYS]))
        share = count / total
        if not mean:
            mean = {name: array * share for name, array in arrays.items()}
            scratch = {name: np.empty_like(array) for name, array in mean.items()}
            continue
        if {name: array.shape for name, array in arrays.items()} != {name: array.shape for name, array in mean.items()}:
            raise TrainingError(f"client {own[CLIENT]} sent weights of another network than the others did")
        for name, array in arrays.items():
            np.multiply(array, share, out=scratch[name])
            mean[name] += scratch[name]
    return to_arrays(mean)


def as_one(reply: Message, mean: Mapping[str, np.ndarray]) -> Message:
    """The mean of a cohort as the reply of one client, `reply` with other weights: what a strategy of the mean goes on with."""
    content = RecordDict({**reply.content, ARRAYS: to_arrays(mean)})
    # Flower makes replies from what they answer
    sent = Message(RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type=MessageType.TRAIN)
    return Message(content, reply_to=sent)
