"""A client's replies: its update and a few numbers, or the reason why it sends none."""

from __future__ import annotations

import logging
import math

from flwr.app import Error, Message, MetricRecord, RecordDict

from fedveil.client.learning.contribution import Contributions, Sealed
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.errors import FedveilError, ProtectionError
from fedveil.core.metrics import LOSS_MEAN, Scores
from fedveil.core.wire.flower import ErrorCode
from fedveil.core.wire.messages import ARRAYS, CLIENT, METRICS, WEIGHT, to_sealed

Metrics = dict[str, int | float | list[int] | list[float]]
log = logging.getLogger("flwr")  # where Flower shows what a node does


def training_reply(
    message: Message, runtime: ClientRuntime, contributions: Contributions, k: int, seconds: float
) -> Message:
    """Reply to a training message with the k-th client's contribution; `seconds`: its duration."""
    refused = contributions.refusals[k]
    if refused is not None:
        return refusal(message, refused, runtime.keys)
    update, client = contributions.updates[k], contributions.clients[k]
    if update is None:
        return refusal(message, ProtectionError("no step of the client's work made an update"), runtime.keys)
    if runtime.deployed and runtime.experiment.privacy.noisy:
        seconds = math.ceil(seconds)  # the time of training tells how many examples there are
    metrics: Metrics = {CLIENT: client, WEIGHT: int(contributions.counts()[k]), "seconds": float(seconds)}
    if isinstance(update, Sealed):
        metrics |= {
            "clipped": update.clipped, "seal-seconds": update.seconds, "open-seconds": contributions.open_seconds,
        }  # fmt: skip
        update = to_sealed(update.blob, runtime.experiment.privacy.protection.name)
    if contributions.steps is not None:
        metrics["steps"] = int(contributions.steps[k])
    if contributions.loss is not None:
        metrics["train-loss"] = float(contributions.loss[k])
    if contributions.global_loss is not None:
        metrics["global-loss"] = float(contributions.global_loss[k])
    return Message(RecordDict({ARRAYS: update, METRICS: MetricRecord(metrics)}), reply_to=message)


def evaluation_reply(message: Message, client: int, scores: Scores, seconds: float) -> Message:
    """Reply to an evaluation message with counts that can be summed."""
    metrics: Metrics = {
        CLIENT: client,
        WEIGHT: scores.examples,
        LOSS_MEAN: scores.loss,
        **scores.sums,
        "seconds": seconds,
    }
    return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)


def refusal(message: Message, error: FedveilError, keys: str = "") -> Message:
    """Reply that a client refuses a message, and why; the path of its keys is left out."""
    log.warning("refused: %s", error)
    reason = str(error).replace(keys, "its folder of keys") if keys else str(error)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)
