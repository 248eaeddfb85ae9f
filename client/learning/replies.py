"""A client's replies: its update and a few numbers, or the reason why it sends none."""

from __future__ import annotations

import logging

from flwr.app import Error, Message, MetricRecord, RecordDict

from fedveil.client.learning.contribution import Contributions, Sealed
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.errors import Disallowed, FedveilError, ProtectionError
from fedveil.core.metrics import LOSS_MEAN, Scores
from fedveil.core.wire.flower import ErrorCode
from fedveil.core.wire.messages import ARRAYS, CLIENT, METRICS, REFUSED, WEIGHT, WITHIN, to_sealed

Metrics = dict[str, int | float | list[int] | list[float]]
log = logging.getLogger("flwr")  # where Flower shows what a node does


def training_reply(
    message: Message, runtime: ClientRuntime, contributions: Contributions, k: int, seconds: float
) -> Message:
    """Reply to a training message with the k-th client's contribution; `seconds`: its duration."""
    refused = contributions.refusals[k]
    if refused is not None:
        return refusal(message, refused, runtime.keys, deployed=runtime.deployed)
    update, client = contributions.updates[k], contributions.clients[k]
    if update is None:
        nothing = ProtectionError("no step of the client's work made an update")
        return refusal(message, nothing, runtime.keys, deployed=runtime.deployed)
    # the time of training tells how many examples there are, and clipped numbers how large they are
    told = not runtime.experiment.privacy.noisy
    metrics: Metrics = {CLIENT: client, WEIGHT: int(contributions.counts()[k]), "seconds": float(seconds) * told}
    if isinstance(update, Sealed):
        metrics |= {
            "clipped": update.clipped * told,
            "seal-seconds": update.seconds * told,
            "open-seconds": contributions.open_seconds * told,
        }
        update = to_sealed(update.blob, runtime.experiment.privacy.protection.name)
    if contributions.steps is not None:
        metrics["steps"] = int(contributions.steps[k])
    if contributions.loss is not None:
        metrics["train-loss"] = float(contributions.loss[k])
    if contributions.global_loss is not None:
        metrics["global-loss"] = float(contributions.global_loss[k])
    if contributions.within is not None:
        metrics[WITHIN] = int(contributions.within[k])
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


def refusal(message: Message, error: FedveilError, keys: str = "", *, deployed: bool = False) -> Message:
    """Reply that a client refuses a message, and write why to the client's own log.

    A deployed client tells its server no reason: that may quote its data, its policy, its files, or what it knows of a
    key. Only the names of settings that its policy refuses are told, which the server itself sent (`Disallowed`).
    A client of a simulation tells the reason, without the path of its keys.
    """
    log.warning("refused: %s", error)
    if deployed:
        reason = f"this client's policy refuses {', '.join(error.keys)}" if isinstance(error, Disallowed) else REFUSED
    else:
        reason = str(error).replace(keys, "its folder of keys") if keys else str(error)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)
