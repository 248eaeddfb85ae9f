"""The Flower client of every experiment, in this process, in Flower's simulation, or on a machine of its own.

A message carries the global model under `arrays` and the round's settings under `config`; the run's
configuration carries the experiment as TOML, and the node's configuration the number of its partition. A client
that must not use what it got, or cannot protect what it has, replies with an error that says why.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedveil.client.masked import STAGES, answer, seal_cohort
from fedveil.client.protect import Sealed, Seen
from fedveil.client.work import Workplace, score, train, workplace
from fedveil.core.errors import FedveilError, ProtectionError, SettingsError
from fedveil.core.messages import (
    ARRAYS,
    BLOB,
    CLIENT,
    CONFIG,
    INBOX,
    METRICS,
    REFERENCE,
    ROUND,
    RUN,
    WEIGHT,
    from_arrays,
    to_arrays,
    to_sealed,
)
from fedveil.models.computing import one_thread
from fedveil.models.evaluation import Scores

app = ClientApp()
Metrics = dict[str, int | float | list[int] | list[float]]
REFUSED = (ProtectionError, SettingsError)  # what a client refuses, and is left out for; other errors are faults
log = logging.getLogger("flwr")  # where Flower shows what a node does
SEEN = "fedveil.seen"  # in a client's state: the newest aggregate it used


def _open(message: Message, context: Context) -> tuple[Workplace, int, ArrayRecord, dict[str, Any]]:
    place, client, config = _address(message, context)
    return place, client, cast(ArrayRecord, message.content[ARRAYS]), config


def _address(message: Message, context: Context) -> tuple[Workplace, int, dict[str, Any]]:
    keys = str(context.node_config.get("keys", context.run_config.get("keys", "")))
    place = workplace(str(context.run_config["experiment"]), keys)
    config = dict(cast(ConfigRecord, message.content[CONFIG]))
    # a node that stands for several clients is told which one; else it is the one whose partition it holds
    return place, int(cast(int, config.get(CLIENT, context.node_config["partition-id"]))), config


def _receive(
    place: Workplace, client: int, record: ArrayRecord, number: int, run: bytes, context: Context
) -> dict[str, np.ndarray]:
    """The weights in a message, the model of round `number`."""
    place.check_agreed(client)
    side = place.lattice(client)
    if side is None:
        return from_arrays(record)
    state = cast(ConfigRecord | None, context.state.get(SEEN))
    seen = None if state is None else cast(Seen, (state["round"], state["sha256"]))
    given, newest = side.receive(record, run, number, seen)
    if newest is not None:
        context.state[SEEN] = ConfigRecord({"round": newest[0], "sha256": newest[1]})
    return given


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, so that the server can order nodes by it."""
    partition = MetricRecord({CLIENT: int(cast(int, context.node_config["partition-id"]))})
    return Message(RecordDict({METRICS: partition}), reply_to=message)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the mean loss."""
    started = time.perf_counter()
    place, client, record, config = _open(message, context)
    number = int(config[ROUND])
    try:
        given = _receive(place, client, record, number - 1, config.get(RUN, b""), context)
        with one_thread():
            wanted = bool(config.get("report-global-loss", False))
            global_loss = score(place, client, given, held_out=False).loss if wanted else None
            rate = float(config["learning-rate"])
            trained = train(place, [client], number, given, rate, config.get("proximal-mu"))
        weights = {name: value[0].cpu().numpy() for name, value in trained.parameters.items()}
        examples = int(trained.examples[0])
        sealed = _seal(place, client, given, weights, examples, message, config, context)
    except REFUSED as error:
        return refusal(message, error, place.keys)
    return training_reply(
        message,
        client,
        to_arrays(weights) if sealed is None else to_sealed(sealed.blob, place.experiment.privacy.protection),
        float(trained.loss[0]),
        examples,
        int(trained.steps[0]),
        global_loss,
        time.perf_counter() - started,
        costs(sealed, place.take_open_seconds(client)),
    )


def _seal(
    place: Workplace,
    client: int,
    given: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    examples: int,
    message: Message,
    config: dict[str, Any],
    context: Context,
) -> Sealed | None:
    """The protected update; None where the experiment protects none. Raise ProtectionError where it cannot be."""
    if place.experiment.privacy.protection == "none":
        return None
    side = place.lattice(client)
    if side is not None:
        return side.seal(weights, client, examples, int(config[ROUND]), config[RUN], int(config[REFERENCE]))
    brought = cast(ConfigRecord, message.content[INBOX])
    member = (client, weights, examples, brought, context.state)
    (sealed,) = seal_cohort(place.masked, [member], config, given, place.keys)
    if isinstance(sealed, ProtectionError):
        raise sealed
    return sealed


def costs(sealed: Sealed | None, open_seconds: float) -> Metrics:
    """What a protected update cost its client, for the reply."""
    if sealed is None:
        return {}
    return {"clipped": sealed.clipped, "seal-seconds": sealed.seconds, "open-seconds": open_seconds}


def _stage(stage: str, message: Message, context: Context) -> Message:
    """A stage of secure aggregation before or after the update."""
    started = time.perf_counter()
    place, client, config = _address(message, context)
    brought = cast(ConfigRecord, message.content[INBOX])
    try:
        place.check_agreed(client)
        blob = answer(place.masked, stage, client, config, brought, context.state, place.keys)
    except REFUSED as error:
        return refusal(message, error, place.keys)
    metrics = MetricRecord({CLIENT: client, "seconds": time.perf_counter() - started})
    return Message(RecordDict({CONFIG: ConfigRecord({BLOB: blob}), METRICS: metrics}), reply_to=message)


for name in STAGES:
    app.query(name)(partial(_stage, name))


def training_reply(
    message: Message,
    client: int,
    arrays: ArrayRecord,
    loss: float,
    examples: int,
    steps: int,
    global_loss: float | None,
    seconds: float,
    costs: Metrics,
) -> Message:
    """What a client replies after it trained; `costs`: of protecting its update."""
    metrics: Metrics = {
        CLIENT: client,
        WEIGHT: examples,
        "steps": steps,
        "train-loss": loss,
        "seconds": seconds,
        **costs,
    }
    if global_loss is not None:
        metrics["global-loss"] = global_loss
    return Message(RecordDict({ARRAYS: arrays, METRICS: MetricRecord(metrics)}), reply_to=message)


def refusal(message: Message, error: FedveilError, keys: str = "") -> Message:
    """What a client replies that will not, or cannot, do what a message asks; where its keys lie stays with it."""
    log.warning("refused: %s", error)
    reason = str(error).replace(keys, "its folder of keys") if keys else str(error)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the part this client holds out; reply with counts that can be summed."""
    started = time.perf_counter()
    place, client, record, config = _open(message, context)
    try:
        given = _receive(place, client, record, int(config.get(ROUND, 0)), config.get(RUN, b""), context)
    except REFUSED as error:
        return refusal(message, error, place.keys)
    with one_thread():
        scores = score(place, client, given, held_out=True)
    return evaluation_reply(message, client, scores, time.perf_counter() - started)


def evaluation_reply(message: Message, client: int, scores: Scores, seconds: float) -> Message:
    """What a client replies after it evaluated."""
    metrics: Metrics = {
        CLIENT: client,
        WEIGHT: scores.examples,
        "loss": scores.loss,
        "correct": scores.correct,
        "true-positives": scores.true_positives,
        "false-positives": scores.false_positives,
        "false-negatives": scores.false_negatives,
        "seconds": seconds,
    }
    return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)
