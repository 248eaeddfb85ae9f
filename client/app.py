"""The Flower client of every experiment, in this process, in Flower's simulation, or on a machine of its own.

A message carries the global model under `arrays` and the round's settings under `config`; the run's
configuration carries the experiment as TOML, and the node's configuration the number of its partition. A client
that must not use what it got, or cannot protect what it has, replies with an error that says why.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedveil.client.guard import guard
from fedveil.client.masked import STAGES, answer, seal_cohort
from fedveil.client.policy import Policy
from fedveil.client.protect import Sealed, Seen
from fedveil.client.work import Own, Workplace, score, train, workplace
from fedveil.core.errors import DataError, FedveilError, ProtectionError, SettingsError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import (
    ARRAYS,
    ATTEMPT,
    BLOB,
    CLIENT,
    CONFIG,
    CONFIRMATIONS,
    INBOX,
    METRICS,
    REFERENCE,
    ROUND,
    RUN,
    SCHEMA,
    WEIGHT,
    from_arrays,
    keep_residual,
    residual_of,
    to_sealed,
    write_update,
)
from fedveil.core.randomness import Stream
from fedveil.datasets.local import schema
from fedveil.models.computing import one_thread
from fedveil.models.evaluation import Scores
from fedveil.privacy.defences import defend

app = ClientApp()
Part = TypeVar("Part", ArrayRecord, ConfigRecord)
Metrics = dict[str, int | float | list[int] | list[float]]
REFUSED = (ProtectionError, SettingsError)  # what a client refuses, and is left out for; other errors are faults
log = logging.getLogger("flwr")  # where Flower shows what a node does
NEEDED: dict[str, tuple[str, ...]] = {  # of what a stage's message brings
    "advertise": (), "share": (BLOB,), "confirm": (BLOB,), "reveal": (BLOB, CONFIRMATIONS)
}  # fmt: skip
SEEN = "fedveil.seen"  # in a client's state: the newest aggregate it used


Handler = Callable[[Message, Context], Message]


def _refusing(handler: Handler) -> Handler:
    """A handler whose refusals are replies: what a client must not, or cannot, do is no fault of its app."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except REFUSED as error:
            return refusal(message, error, _keys(context))

    return answer


def _open(message: Message, context: Context) -> tuple[Workplace, int, ArrayRecord, dict[str, Any]]:
    place, client, config = _address(message, context)
    return place, client, _part(message, ARRAYS, ArrayRecord), config


def _address(message: Message, context: Context) -> tuple[Workplace, int, dict[str, Any]]:
    place = _workplace(context)
    config = dict(_part(message, CONFIG, ConfigRecord))
    # a node that stands for several clients is told which one; else it is the one whose partition it holds
    client = (
        context.node_config["partition-id"]
        if _deployed(context)
        else config.get(CLIENT, context.node_config["partition-id"])
    )
    return place, int(cast(int, client)), config


def _part(message: Message, key: str, kind: type[Part]) -> Part:
    """A record of a message; raise ProtectionError where the server sent none."""
    found = message.content.get(key)
    if not isinstance(found, kind):
        raise ProtectionError(f"the server's message has no {kind.__name__} '{key}'")
    return found


def _number(config: Mapping[str, Any], key: str) -> float:
    """A number among a message's settings; raise ProtectionError where the server sent none."""
    value = config.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtectionError(f"the server's message has no number '{key}'")
    return float(value)


def _deployed(context: Context) -> bool:
    """Whether this is a client on a machine of its own, whose server is somebody else."""
    return "data" in context.node_config


def _keys(context: Context) -> str:
    """The folder of this client's keys; a deployed client takes none that the server names."""
    node = context.node_config
    return str(node.get("keys", "" if _deployed(context) else context.run_config.get("keys", "")))


def _policy(context: Context) -> Policy:
    """What the owner of a client on a machine of its own allows."""
    path = str(context.node_config.get("policy", ""))
    return Policy.read(Path(path)) if path else Policy()


def _workplace(context: Context) -> Workplace:
    """What this node needs for the run; raise ProtectionError where its owner's policy refuses the run's settings."""
    node, run = context.node_config, str(context.run_config["experiment"])
    if not _deployed(context):
        return workplace(run, _keys(context))
    _policy(context).check(Experiment.received(run))
    own = Own(str(node["data"]), int(cast(int, node["partition-id"])), str(context.run_config.get("words", "")))
    try:
        return workplace(run, _keys(context), own)
    except DataError as error:
        log.warning("refused: %s", error)  # it may quote the data, which stays here
        raise ProtectionError("its data does not fit the run; the client's own log says where") from None


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
@_refusing
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, so that the server can order nodes by it; and what data of its own it brings."""
    client = int(cast(int, context.node_config["partition-id"]))
    if not _deployed(context):
        return Message(RecordDict({METRICS: MetricRecord({CLIENT: client})}), reply_to=message)
    place = _workplace(context)
    place.check_agreed(client)
    dataset = place.federated.dataset
    examples = int(place.federated.sizes(np.array([client]))[0])
    found = json.dumps(schema(dataset.task, dataset.words, dataset.columns))
    log.info("takes part with %d examples: %s", examples, found)
    weight = 1 if place.experiment.privacy.noisy else examples  # how many it holds is of its data
    metrics = MetricRecord({CLIENT: client, WEIGHT: weight})
    return Message(RecordDict({METRICS: metrics, CONFIG: ConfigRecord({SCHEMA: found})}), reply_to=message)


@app.train()
@_refusing
def fit(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the mean loss."""
    started = time.perf_counter()
    place, client, record, config = _open(message, context)
    number, rate = int(_number(config, ROUND)), _number(config, "learning-rate")
    if number > place.experiment.federation.rounds:
        raise ProtectionError(
            f"the server asks for round {number} of a run with federation.rounds = {place.experiment.federation.rounds}"
        )
    given = _receive(place, client, record, number - 1, config.get(RUN, b""), context)
    with one_thread():
        wanted = bool(config.get("report-global-loss", False))
        global_loss = score(place, client, given, held_out=False).loss if wanted else None
        trained = train(place, [client], number, given, rate, config.get("proximal-mu"))
    privacy, stream = place.experiment.privacy, Stream(place.experiment.seed, number, client)
    weights = {name: value[0].cpu().numpy() for name, value in trained.parameters.items()}
    weights = defend(privacy, given, weights, stream, secret=_deployed(context))
    examples = 1 if privacy.noisy else int(trained.examples[0])
    sealed = _seal(place, client, given, weights, examples, message, config, context)
    if sealed is None:
        guard(place, client, given, weights, _policy(context).leak_guard)
        encoding = place.experiment.communication.encoding
        update, lost = write_update(weights, given, encoding, residual_of(context.state, client))
        keep_residual(context.state, client, lost)
    else:
        update = to_sealed(sealed.blob, place.experiment.privacy.protection.name)
    return training_reply(
        message,
        client,
        update,
        None if privacy.noisy else float(trained.loss[0]),
        examples,
        None if privacy.noisy else int(trained.steps[0]),
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
    if not place.experiment.privacy.protected:
        return None
    reference, run = int(_number(config, REFERENCE)), config.get(RUN)
    if not isinstance(run, bytes):
        raise ProtectionError("the server's message does not name its run")
    side = place.lattice(client)
    if side is not None:
        return side.seal(weights, client, examples, int(config[ROUND]), run, reference)
    member = (client, weights, examples, _brought(message), context.state)
    (sealed,) = seal_cohort(place.masked, [member], _of_a_stage(config), given, place.keys)
    if isinstance(sealed, ProtectionError):
        raise sealed
    return sealed


def _brought(message: Message) -> dict[str, Any]:
    """What a message of secure aggregation brings for its client alone."""
    found = dict(_part(message, INBOX, ConfigRecord))
    if any(not isinstance(value, bytes) for value in found.values()):
        raise ProtectionError("the server's message brings something else than bytes for this client")
    return found


def _of_a_stage(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a stage of secure aggregation; raise ProtectionError where the server left one out."""
    for key in (ROUND, ATTEMPT):
        _number(config, key)
    if not isinstance(config.get(RUN), bytes):
        raise ProtectionError("the server's message does not name its run")
    return config


def costs(sealed: Sealed | None, open_seconds: float) -> Metrics:
    """What a protected update cost its client, for the reply."""
    if sealed is None:
        return {}
    return {"clipped": sealed.clipped, "seal-seconds": sealed.seconds, "open-seconds": open_seconds}


def _stage(stage: str, message: Message, context: Context) -> Message:
    """A stage of secure aggregation before or after the update."""
    started = time.perf_counter()
    place, client, config = _address(message, context)
    place.check_agreed(client)
    brought = _brought(message)
    if missing := [key for key in NEEDED[stage] if key not in brought]:
        raise ProtectionError(f"the server's message of the stage '{stage}' lacks '{missing[0]}'")
    blob = answer(place.masked, stage, client, _of_a_stage(config), brought, context.state, place.keys)
    metrics = MetricRecord({CLIENT: client, "seconds": time.perf_counter() - started})
    return Message(RecordDict({CONFIG: ConfigRecord({BLOB: blob}), METRICS: metrics}), reply_to=message)


for name in STAGES:
    app.query(name)(_refusing(partial(_stage, name)))


def training_reply(
    message: Message,
    client: int,
    arrays: ArrayRecord,
    loss: float | None,
    examples: int,
    steps: int | None,
    global_loss: float | None,
    seconds: float,
    costs: Metrics,
) -> Message:
    """What a client replies after it trained; `costs`: of protecting its update.

    None is what it does not tell: where noise is added, all that is of its data and that no noise would cover.
    """
    told = {"steps": steps, "train-loss": loss, "global-loss": global_loss}
    metrics: Metrics = {CLIENT: client, WEIGHT: examples, "seconds": seconds, **costs}
    metrics |= {key: value for key, value in told.items() if value is not None}
    return Message(RecordDict({ARRAYS: arrays, METRICS: MetricRecord(metrics)}), reply_to=message)


def refusal(message: Message, error: FedveilError, keys: str = "") -> Message:
    """What a client replies that will not, or cannot, do what a message asks; where its keys lie stays with it."""
    log.warning("refused: %s", error)
    reason = str(error).replace(keys, "its folder of keys") if keys else str(error)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


@app.evaluate()
@_refusing
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the part this client holds out; reply with counts that can be summed."""
    started = time.perf_counter()
    place, client, record, config = _open(message, context)
    given = _receive(place, client, record, int(config.get(ROUND, 0)), config.get(RUN, b""), context)
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
