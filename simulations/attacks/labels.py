"""The labels of a client's examples, as counts of each class, from the update of the last bias."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.batches import steps_of
from fedveil.models.local.inputs import device_of, to_tensor
from fedveil.privacy.leakage import labels
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters

MADE_UP = 512  # made-up examples for the network, where no auxiliary ones are known
ROUNDS = 50  # limit on iterations of counts and the probabilities that follow from them


def read(observation: Observation, known: Known, stream: Stream) -> np.ndarray:
    """Count the examples of each class: int64 [classes]."""
    assert observation.before is not None
    assert observation.update is not None
    assert observation.examples is not None
    classes, examples = len(known.task.classes), observation.examples
    name = labels.find(observation.before, classes)
    assert name is not None
    sent = labels.per_class(observation.update[name])
    change = sent if observation.kind == "gradient" else -sent
    if examples == 1:
        return np.bincount([labels.one(change)], minlength=classes)
    shares = class_shares(known, observation.before, stream)
    length = 1.0 if observation.kind == "gradient" else _step_length(observation)
    found = np.full(classes, examples / classes)
    for _ in range(ROUNDS):
        expected = found @ shares / examples
        gradient = change / (length or _longest(change, expected))
        last, found = found, labels.counts(gradient, expected, examples)
        if (last == found).all():
            break
    return found.astype(np.int64)


def class_shares(known: Known, before: Parameters, stream: Stream) -> np.ndarray:
    """Return the network's mean probabilities for examples of each class, float64 [classes, classes].

    The examples are `known.auxiliary`; without it made-up ones, the same for all classes (LLG*, Wainakh et al. 2022).
    """
    classes = len(known.task.classes)
    if known.auxiliary is None:
        rng = stream.generator("made-up examples")
        shape = (MADE_UP, *known.task.shape)
        made = (
            rng.integers(1, known.task.vocabulary_size, shape)
            if known.task.kind == "text"
            else rng.random(shape, np.float32)
        )
        return np.tile(_probabilities(known.network, before, made).mean(axis=0), (classes, 1))
    found = _probabilities(known.network, before, known.auxiliary.features)
    own = [found[known.auxiliary.labels == label] for label in range(classes)]
    return np.array([(rows if len(rows) else found).mean(axis=0) for rows in own])


def _probabilities(network: nn.Module, before: Parameters, features: np.ndarray) -> np.ndarray:
    device = device_of(network)
    with weights.kept(network), torch.no_grad():
        weights.place(network, weights.from_numpy(before, device))
        logits = network.eval()(to_tensor(features, device)).double().cpu()
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    probabilities: np.ndarray = logits.softmax(dim=1).numpy()
    return probabilities


def _step_length(observation: Observation) -> float | None:
    """Return how far training goes along a constant gradient of 1; None where that is not known."""
    training, clients = observation.training, observation.clients
    if training is None or observation.examples is None:
        return None
    return step_length(training, steps_of(max(observation.examples // clients, 1), training))


def step_length(training: Training, steps: int) -> float:
    """Return the sum of SGD's steps along a gradient of 1, with the learning rate and momentum of `training`."""
    length = velocity = 0.0
    for _ in range(steps):
        velocity = training.momentum * velocity + 1
        length += training.learning_rate * (1 + training.momentum * velocity if training.nesterov else velocity)
    return length


def _longest(change: np.ndarray, expected: np.ndarray) -> float:
    """Return the step length at which the count of one class is 0 and none is negative."""
    return float((change / expected).max()) or 1.0


def suits(known: Known) -> str | None:
    """Return why a network's update reveals no labels, or None."""
    classes = len(known.task.classes)
    if labels.find(weights.to_numpy(weights.get(known.network)), classes) is None:
        return f"the network's last weight is no bias of an output layer for {classes} classes; take model.name = 'mlp'"
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """Return what makes the counts rough, or None.

    They are right on a fresh model, after one step of SGD, for cross entropy, with examples like the clients'.
    """
    training = observation.training
    if training is not None and training.loss != "cross_entropy":
        return f"training.loss = '{training.loss}': labels are read as the gradient of cross entropy shows them"
    if observation.examples == 1:
        return None
    if training is None and observation.kind != "gradient":
        return "how clients train is not known: counts are right only where a class does not occur at all"
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}': its steps do not grow with the gradient; labels cannot be counted"
    if known.auxiliary is None:
        return "without examples like the clients' the network is asked about noise, and counts are rough"
    return "counts are right after one step of a fresh model; rough after several, hardly better than chance on a trained one"


LABELS = Attack(
    run=read,
    recovers="labels",
    needs=("update", "examples"),
    suits=suits,
    warn=warn,
    cost="milliseconds",
    cites="Zhao et al. 2020 (iDLG), section 3; Wainakh et al. 2022 (LLG)",
)
