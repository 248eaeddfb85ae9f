"""The Flower client of every experiment, in this process, in Flower's simulation, or on a machine of its own.

A message carries the global model under `arrays` and the round's settings under `config`; the run's
configuration carries the experiment as TOML, and the node's configuration the number of its partition.
"""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.work import Workplace, score, train, workplace
from fedveil.core.messages import ARRAYS, CLIENT, CONFIG, METRICS, ROUND, WEIGHT, from_arrays, to_arrays
from fedveil.models.computing import one_thread
from fedveil.models.evaluation import Scores

app = ClientApp()
Metrics = dict[str, int | float | list[int] | list[float]]


def _open(message: Message, context: Context) -> tuple[Workplace, int, ArrayRecord, dict[str, Any]]:
    place = workplace(str(context.run_config["experiment"]))
    arrays = cast(ArrayRecord, message.content[ARRAYS])
    config = dict(cast(ConfigRecord, message.content[CONFIG]))
    # a node that stands for several clients is told which one; else it is the one whose partition it holds
    client = int(cast(int, config.get(CLIENT, context.node_config["partition-id"])))
    return place, client, arrays, config


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, so that the server can order nodes by it."""
    partition = MetricRecord({CLIENT: int(cast(int, context.node_config["partition-id"]))})
    return Message(RecordDict({METRICS: partition}), reply_to=message)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the mean loss."""
    started = time.perf_counter()
    place, client, arrays, config = _open(message, context)
    given = from_arrays(arrays)
    with one_thread():
        wanted = bool(config.get("report-global-loss", False))
        global_loss = score(place, client, given, held_out=False).loss if wanted else None
        rate = float(config["learning-rate"])
        trained = train(place, [client], int(config[ROUND]), given, rate, config.get("proximal-mu"))
    return training_reply(
        message,
        client,
        {name: value[0].cpu().numpy() for name, value in trained.parameters.items()},
        float(trained.loss[0]),
        int(trained.examples[0]),
        int(trained.steps[0]),
        global_loss,
        time.perf_counter() - started,
    )


def training_reply(
    message: Message,
    client: int,
    weights: dict[str, np.ndarray],
    loss: float,
    examples: int,
    steps: int,
    global_loss: float | None,
    seconds: float,
) -> Message:
    """What a client replies after it trained."""
    metrics: Metrics = {CLIENT: client, WEIGHT: examples, "steps": steps, "train-loss": loss, "seconds": seconds}
    if global_loss is not None:
        metrics["global-loss"] = global_loss
    return Message(RecordDict({ARRAYS: to_arrays(weights), METRICS: MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the part this client holds out; reply with counts that can be summed."""
    started = time.perf_counter()
    place, client, arrays, _ = _open(message, context)
    with one_thread():
        scores = score(place, client, from_arrays(arrays), held_out=True)
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
