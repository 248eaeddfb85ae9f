"""The client app, message by message: what it replies, and that it computes what the training function computes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil import DataError, Experiment
from fedveil.client.app import app
from fedveil.core.randomness import Stream
from fedveil.core.wire.messages import from_arrays, to_arrays
from fedveil.datasets.federated import load
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.simulations.engine.grid import InProcessGrid

SETTINGS = Experiment.preset("digits").override(
    {"data.validation_fraction": 0.25, "training.epochs": 1, "evaluation.federated": True}
)


@pytest.fixture
def network() -> torch.nn.Module:
    return build(load(SETTINGS.data, 0).dataset.task, SETTINGS.model, Stream(0))


def ask(kind: str, client: int, network: torch.nn.Module | None = None, /, settings=SETTINGS, **config) -> Message:
    content = RecordDict()
    if network is not None:
        content = RecordDict({"arrays": to_arrays(to_numpy(get(network))), "config": ConfigRecord(config)})
    grid = InProcessGrid(app, SETTINGS.data.clients, {"experiment": settings.toml()})
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=client + 1, message_type=kind)])
    return reply


def test_a_node_says_which_partition_it_holds() -> None:
    assert ask("query", 4).content["metrics"]["client"] == 4


def test_training_replies_with_what_the_training_function_gives(network) -> None:
    torch.set_num_threads(2)
    reply = ask("train", 3, network, **{"server-round": 7, "learning-rate": 0.2})
    assert torch.get_num_threads() == 2
    examples, _ = load(SETTINGS.data, 0).client(3)
    torch.set_num_threads(1)
    wanted = train_clients(network, get(network), [examples], SETTINGS.training, 0.2, [Stream(0, 7, 3)], classes=10)
    for name, value in from_arrays(reply.content["arrays"]).items():
        np.testing.assert_array_equal(value, wanted.parameters[name][0].numpy())
    metrics = reply.content["metrics"]
    assert (metrics["client"], metrics["num-examples"]) == (3, len(examples))
    assert metrics["train-loss"] == wanted.loss[0]


def test_a_proximal_term_and_the_global_loss_come_with_the_message(network) -> None:
    plain = ask("train", 0, network, **{"server-round": 1, "learning-rate": 0.2})
    near = ask("train", 0, network, **{"server-round": 1, "learning-rate": 0.2, "proximal-mu": 5.0})
    start = to_numpy(get(network))

    def moved(reply: Message) -> float:
        return sum(float(((v - start[k]) ** 2).sum()) for k, v in from_arrays(reply.content["arrays"]).items())

    assert moved(near) < 0.5 * moved(plain)
    asked = ask("train", 0, network, **{"server-round": 1, "learning-rate": 0.2, "report-global-loss": True})
    examples, _ = load(SETTINGS.data, 0).client(0)
    assert asked.content["metrics"]["global-loss"] == evaluate(network, None, examples, "cross_entropy").loss


def test_evaluation_counts_on_the_part_the_client_holds_out(network) -> None:
    settings = SETTINGS.override({"evaluation.federated": True})
    metrics = ask("evaluate", 5, network, settings=settings, **{"server-round": 1}).content["metrics"]
    _, held_out = load(SETTINGS.data, 0).client(5)
    wanted = evaluate(network, None, held_out, "cross_entropy")
    assert (metrics["num-examples"], metrics["correct"], metrics["loss"]) == (
        len(held_out),
        wanted.sums["correct"],
        wanted.loss,
    )


def test_a_client_that_is_told_which_one_it_is_is_that_one(network) -> None:
    told = ask("train", 0, network, **{"server-round": 1, "learning-rate": 0.2, "client": 8})
    own = ask("train", 8, network, **{"server-round": 1, "learning-rate": 0.2})
    assert told.content["metrics"]["client"] == 8
    for name, value in from_arrays(told.content["arrays"]).items():
        np.testing.assert_array_equal(value, from_arrays(own.content["arrays"])[name])


def test_int8_sends_the_difference_and_what_the_update_before_lost(network) -> None:
    settings = SETTINGS.override({"communication.encoding": "int8"})
    grid = InProcessGrid(app, SETTINGS.data.clients, {"experiment": settings.toml()})
    start, plain = to_numpy(get(network)), {}
    lost = {name: np.zeros_like(value) for name, value in start.items()}
    for number in (1, 2, 3):
        config = {"server-round": number, "learning-rate": 0.2}
        content = RecordDict({"arrays": to_arrays(start), "config": ConfigRecord(config)})
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=4, message_type="train")])
        plain = from_arrays(ask("train", 3, network, **config).content["arrays"])
        for name, array in reply.content["arrays"].items():
            wanted = plain[name] - start[name] + lost[name]
            scale = np.frombuffer(array.data[:4], "<f4")[0]
            levels = np.frombuffer(array.data[4:], np.int8).reshape(wanted.shape)
            assert scale == np.abs(wanted).max() / np.float32(127)
            np.testing.assert_array_equal(levels, np.round(wanted / scale))
            lost[name] = wanted - levels * scale
        assert any(value.any() for value in lost.values())


def test_weights_that_float16_cannot_hold_are_refused(network) -> None:
    settings = SETTINGS.override({"communication.encoding": "float16"})
    start = to_numpy(get(network))
    start["output.bias"] = np.full_like(start["output.bias"], 7e4)  # the same for all classes: it changes nothing
    grid = InProcessGrid(app, SETTINGS.data.clients, {"experiment": settings.toml()})
    config = ConfigRecord({"server-round": 1, "learning-rate": 0.2})
    content = RecordDict({"arrays": to_arrays(start), "config": config})
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=4, message_type="train")])
    assert re.match(r"'output.bias' holds (7e\+04|699\d\d.*|700\d\d.*), and float16 ends at 65504", reply.error.reason)


def test_weights_of_another_model_are_refused(network) -> None:
    other = build(load(SETTINGS.data, 0).dataset.task, SETTINGS.override({"model.hidden": [3]}).model, Stream(0))
    with pytest.raises(DataError, match="these weights are not of this network"):
        ask("train", 0, other, **{"server-round": 1, "learning-rate": 0.2})
