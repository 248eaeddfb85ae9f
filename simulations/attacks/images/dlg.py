"""Deep leakage from gradients: a search for images, and their labels, whose gradient equals the observed one.

Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019, algorithm 1: L-BFGS (here SciPy's) minimizes the squared
distance of the gradients over all images and label probabilities at once. "iDLG" (Zhao, Mopuri and Bilen 2020) takes
the labels from the gradient first. Both need second derivatives, which sigmoid has and ReLU hardly.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call

from fedveil.core.randomness import Stream
from fedveil.models import parameters as weights
from fedveil.models.local.batches import steps_of
from fedveil.models.local.inputs import device_of
from fedveil.simulations.attacks.images.matching import Labels, descent, losses
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters
from fedveil.simulations.attacks.labels import read
from fedveil.simulations.attacks.labels import suits as shows_labels

ITERATIONS = 1200
RESTARTS = 3  # searches from other random images, until one of them matches
MATCHED = 1e-6  # share of the squared gradient, below which a search has succeeded
MEMORY = 50  # of L-BFGS, in steps
BENT = (nn.ReLU, nn.LeakyReLU, nn.PReLU)  # piecewise linear: no second derivative
FEW = 8  # images, above which next to none is found


def reconstruct(observation: Observation, known: Known, stream: Stream, *, labels: Labels | None) -> np.ndarray:
    """Return the images, float32 [n, *shape], with the smallest distance of `RESTARTS` searches.

    labels: (observation, what is known, stream) -> how many images of each class there are, int64 [classes]; None to
        search for them as well
    """
    device, n, classes = device_of(known.network), observation.examples or 0, len(known.task.classes)
    start = weights.from_numpy({name: a.astype(np.float64) for name, a in (observation.before or {}).items()}, device)
    start = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    state = {name: b.double() if b.is_floating_point() else b for name, b in known.network.named_buffers()}
    seen = weights.from_numpy(gradient(observation), device)
    energy = float(_square(seen))
    rng = stream.generator("deep leakage")
    pixels = n * math.prod(known.task.shape)
    loss = observation.training.loss if observation.training else "cross_entropy"
    fixed = None
    if labels is not None:
        own = np.repeat(np.arange(classes), labels(observation, known, stream))
        fixed = torch.from_numpy(np.eye(classes)[own]).to(device)

    def distance(flat: np.ndarray) -> tuple[float, np.ndarray]:
        guess = torch.from_numpy(flat).to(device).requires_grad_()
        images = guess[:pixels].view(n, *known.task.shape)
        truth = fixed if fixed is not None else guess[pixels:].view(n, classes).softmax(1)
        value = losses(functional_call(known.network, {**state, **start}, (images,)), truth, loss).mean()
        slopes = torch.autograd.grad(value, list(start.values()), create_graph=True, materialize_grads=True)
        off = _square({name: slope - seen[name] for name, slope in zip(start, slopes, strict=True)}) / energy
        (back,) = torch.autograd.grad(off, guess)
        return float(off.detach()), back.cpu().numpy()

    best, least = np.zeros(pixels), np.inf
    with weights.kept(known.network):
        known.network.eval()
        for _ in range(RESTARTS):
            guess = rng.normal(size=pixels + (n * classes if fixed is None else 0))
            found = minimize(
                distance, guess, jac=True, method="L-BFGS-B",
                options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.0},
            )  # fmt: skip
            if found.fun < least:
                best, least = found.x[:pixels], found.fun
            if least < MATCHED:
                break
    return np.clip(best, 0, 1).reshape(n, *known.task.shape).astype(np.float32)


def gradient(observation: Observation) -> Parameters:
    """Return the mean gradient of a step: the observed one, or the weights' descent over learning rate and steps."""
    down = descent(observation)
    if observation.kind == "gradient" or observation.training is None:
        return down
    taken = observation.training.learning_rate * _steps(observation)
    return {name: array / taken for name, array in down.items()}


def _steps(observation: Observation) -> int:
    """Return the number of local steps of each client."""
    each = max((observation.examples or 0) // observation.clients, 1)
    return steps_of(each, observation.training) if observation.training else 1


def _square(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum()


def suits(known: Known) -> str | None:
    """Return why nothing can be searched for, or None: the data must be images."""
    if known.task.kind != "images":
        return f"the data are {known.task.kind}, and it searches for images; take a preset of images, such as mnist-mlp"
    return None


def suits_with_labels(known: Known) -> str | None:
    """Return why nothing can be searched for, or None: the data must be images, and the last bias show their labels."""
    return suits(known) or shows_labels(known)


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the search, the worst first, or None."""
    training, n = observation.training, observation.examples or 0
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}': its steps are no gradients, and nothing is found by matching them"
    if any(isinstance(module, BENT) for module in known.network.modules()):
        return "ReLU has no second derivative to follow, and it mostly fails; take attack 'matching', or model.activation = 'sigmoid'"
    if _steps(observation) > 1:
        return f"{_steps(observation)} local steps are taken for one gradient, which they are not: a blur at best"
    if n > FEW:
        return f"{n} images at once: next to none is found"
    return None


DLG = Attack(
    run=partial(reconstruct, labels=None),
    recovers="images",
    needs=("update", "training", "examples"),
    suits=suits,
    warn=warn,
    cost="a second an image",
    cites="Zhu et al. 2019, Deep Leakage from Gradients (1906.08935)",
)

IDLG = Attack(
    run=partial(reconstruct, labels=read),
    recovers="images",
    needs=("update", "training", "examples"),
    suits=suits_with_labels,
    warn=warn,
    cost="a second an image",
    cites="Zhao et al. 2020, iDLG (2001.02610)",
)
