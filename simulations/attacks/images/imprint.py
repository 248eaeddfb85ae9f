"""A malicious server whose first layer sorts images into bins, so that each leaves a separate mark.

Fowl, Geiping, Czaja, Goldblum and Goldstein, "Robbing the Fed: Directly obtaining private data in federated learning
with modified models", ICLR 2022, section 4: all units of a layer measure the same of an image, here its mean
brightness, against different thresholds; the updates of units with neighbouring thresholds differ by the images between
them. The paper adds a layer; here the architecture is agreed upon, and the first layer gets weights that sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.models.local.batches import steps_of
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters

# of the first layer: large keeps bins in place over local steps, small keeps marks clear of float32's rounding
SCALE = 4.0
CLEAR = 0.2  # roundings of a float32 weight, above which the mean of a bin's mark is no rounding error
FEW = 32  # units, below which even small batches share bins
KINDS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)  # linear on both sides of a threshold


def craft(parameters: Parameters, known: Known, stream: Stream) -> Parameters:
    """Return the model to send: the first dense layer sorts, the second treats all bins alike, the rest stays.

    Raises SettingsError where the network has no such layers, or no auxiliary examples show how bright images are.
    """
    reason = suits(known)
    if reason or known.auxiliary is None:
        raise SettingsError(f"attack 'imprint': {reason or 'needs examples like the clients, to place its bins'}")
    first, second = _dense(known.network)
    sent = dict(parameters)
    units, pixels = sent[f"{first}.weight"].shape
    brightness = known.auxiliary.features.reshape(len(known.auxiliary), -1).mean(axis=1, dtype=np.float64)
    edges = np.ones(units)  # the last one, which no image passes
    edges[:-1] = np.quantile(brightness, np.arange(units - 1) / (units - 1))
    edges[0] = 0.0  # images darker than all of those share the first bin
    sent[f"{first}.weight"] = np.full((units, pixels), SCALE / pixels, np.float32)
    sent[f"{first}.bias"] = (-SCALE * edges).astype(np.float32)
    most = SCALE * np.maximum(brightness.max() - edges, 0).sum()  # the largest sum over units
    outputs = sent[f"{second}.weight"].shape[0]
    signs = stream.generator("imprint").choice([-1.0, 1.0], outputs)
    sent[f"{second}.weight"] = np.repeat(signs[:, None] / most, units, axis=1).astype(np.float32)
    sent[f"{second}.bias"] = np.where(signs < 0, 1.0, 0.0).astype(np.float32)  # so that no unit of it is ever off
    return sent


def recover(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Return the mean image of each used bin, float32 [m, *shape]: the clearest, no more than there are images."""
    assert observation.update is not None  # `needs` asks for it
    assert observation.before is not None
    first, _ = _dense(known.network)
    sent, change = observation.before[f"{first}.weight"], observation.update[f"{first}.weight"]  # [units, pixels]
    scale = sent.sum(axis=1, dtype=np.float64)
    edges = -observation.before[f"{first}.bias"] / scale  # as mean brightness
    order = np.argsort(edges, kind="stable")
    low, high = edges[order][:-1], edges[order][1:]
    mark, bias = (-np.diff(array[order], axis=0) for array in (change, observation.update[f"{first}.bias"]))
    bright = mark.mean(axis=1)  # brightness of the image, times the mark's strength
    used = np.abs(bright) > CLEAR * np.spacing(np.abs(sent).max())
    mark, bias, bright = mark[used], bias[used], bright[used]
    # the bias gives the mark's strength, with rounding; the bin bounds the image's brightness
    with np.errstate(divide="ignore"):
        brightness = np.clip(bright / bias, low[used], high[used])
    images = np.clip(mark / bright[:, None] * brightness[:, None], 0, 1)
    if observation.examples is not None:  # local steps leave weak marks in bins that hold no image
        images = images[np.sort(np.argsort(-np.abs(bright), kind="stable")[: observation.examples])]
    found: np.ndarray = images.reshape(-1, *known.task.shape).astype(np.float32)
    return found


def _dense(network: nn.Module) -> tuple[str, str]:
    """Return the names of the first two dense layers."""
    first, second = [name for name, layer in network.named_children() if type(layer) is nn.Linear][:2]
    return first, second


def suits(known: Known) -> str | None:
    """Return why a network's first layer cannot be made to sort images, or None."""
    if known.task.kind != "images":
        return f"it sorts images by their brightness, and the data are {known.task.kind}"
    layers: list[Any] = list(known.network.children()) if type(known.network) is nn.Sequential else []
    start = [type(layer) for layer in layers[:4]]
    if len(start) < 4 or start[:2] + start[3:] != [nn.Flatten, nn.Linear, nn.Linear] or start[2] not in KINDS:
        return (
            "it needs a network that starts with two dense layers with ReLU between them, and nothing else (model.name = "
            "'mlp', model.activation = 'relu', model.normalization = 'none', model.dropout = 0)"
        )
    if any(layer.bias is None for layer in layers[1:4:2]):
        return "it needs dense layers with biases"
    if len(layers[1].bias) < FEW:
        return f"it sorts into a bin a unit, and {len(layers[1].bias)} in the first layer are too few; take model.hidden = [256, 64]"
    return None


def warn(observation: Observation, _known: Known) -> str | None:
    """Return what will spoil the marks, or None: local steps move the thresholds, and Adam levels the marks."""
    training = observation.training
    if training is None:
        return "bins move at every local step: several steps leave the images of fewer bins whole"
    if training.optimizer != "sgd":
        return (
            f"clients train with {training.optimizer}, which makes all marks alike in size: expect none to be an image"
        )
    steps = steps_of(observation.examples or 1, training)
    if steps > 1:
        return f"bins move at each of the {steps} local steps: fewer images stay alone in theirs"
    return None


IMPRINT = Attack(
    run=recover,
    recovers="images",
    needs=("update", "auxiliary", "crafted"),
    suits=suits,
    warn=warn,
    craft=craft,
    cost="milliseconds",
    cites="Fowl et al. 2022, Robbing the Fed (2110.13057)",
)
