"""Images from the update of a dense first layer, by division: exact for one image, and for some of a small batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.batches import steps_of
from fedveil.privacy.leakage import first_layer
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation

FEW = 8  # examples, of which about half are still alone in a unit of a fresh network


def read(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Return at most as many images as the update was made of, float32 [m, *task.shape] in [0, 1]."""
    assert observation.examples is not None
    weight, bias = layer_update(observation, known)
    if observation.examples == 1:
        images = first_layer.one(weight, bias)[None]
    else:
        images = first_layer.several(weight, bias, observation.examples)
    return np.asarray(np.clip(images, 0, 1), np.float32).reshape(-1, *known.task.shape)


def layer_update(observation: Observation, known: Known) -> tuple[np.ndarray, np.ndarray]:
    """Return what gradients changed in the first layer's weight [units, inputs] and bias [units], float64.

    The change by weight decay is left out where the observer knows how clients train.
    """
    assert observation.before is not None
    assert observation.update is not None
    names = first_layer.find(observation.before, int(np.prod(known.task.shape)))
    assert names is not None
    assert names[1] is not None
    weight, bias = (observation.update[name] for name in names if name is not None)
    training = observation.training
    if training is None or training.weight_decay == 0 or observation.kind == "gradient" or not observation.examples:
        return weight, bias
    shrunk = kept_share(training, steps_of(max(observation.examples // observation.clients, 1), training)) - 1
    before = [observation.before[name].astype(np.float64) for name in names if name is not None]
    return weight - shrunk * before[0], bias - shrunk * before[1]


def kept_share(training: Training, steps: int) -> float:
    """Return the share of a weight without a gradient that weight decay leaves after `steps` steps of SGD or AdamW.

    The recursion of SGD with momentum for w = 1 and the gradient weight_decay * w (Sutskever et al. 2013, equations 1, 2).
    """
    share, velocity = 1.0, 0.0
    momentum = training.momentum if training.optimizer == "sgd" else 0.0
    for _ in range(steps):
        slope = training.weight_decay * share
        velocity = momentum * velocity + slope
        share -= training.learning_rate * (slope + momentum * velocity if training.nesterov else velocity)
    return share


def suits(known: Known) -> str | None:
    """Return why a network's first layer reveals no images, or None."""
    if known.task.kind != "images":
        return f"the data are {known.task.kind}, and it reads images; take a preset of images, such as mnist-mlp"
    inputs = int(np.prod(known.task.shape))
    names = first_layer.find(weights.to_numpy(weights.get(known.network)), inputs)
    if names is None:
        return f"the network does not start with a dense layer on all {inputs:,} pixels; take model.name = 'mlp'"
    if names[1] is None:
        return f"the first layer '{names[0]}' has no bias, and the images are its weights' update divided by its bias's"
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the images, or None.

    Adam divides every weight's step by its size; in a large batch few images are alone in a unit.
    """
    training = observation.training
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}': a silhouette at best, about 14 dB; its steps are no gradients"
    if observation.examples is not None and observation.examples > FEW:
        units = _units(known)
        return (
            f"{observation.examples} images in {units} units: few are alone in one, and the others come out as mixtures"
        )
    return None


def _units(known: Known) -> int:
    first: Any = next(known.network.parameters())
    return int(first.shape[0])


FIRST_LAYER = Attack(
    run=read,
    recovers="images",
    needs=("update", "examples"),
    suits=suits,
    warn=warn,
    cost="milliseconds",
    cites="Phong et al. 2018, section 3; Geiping et al. 2020, proposition 3.1",
)
