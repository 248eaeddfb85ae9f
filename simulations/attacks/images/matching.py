"""Gradient matching: search for images whose training would have changed the weights as the client's did.

Geiping, Bauermeister, Dröge and Moeller, "Inverting Gradients: How easy is it to break privacy in federated learning?",
NeurIPS 2020: Adam, on the sign of the gradient, minimizes the angle between the two changes (equation 4), with a prior
that images are smooth. Where the observer knows how several local steps were taken, they are replayed (section 5).

The change of a dense first layer's weights is a sum of outer products with the images, which so lie in the space of its
rows (Dimitrov et al. 2024, "SPEAR", section 3): n directions are searched, not every pixel. Labels are first read from
the last bias, whose counts are rough after several steps, and then corrected along with the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.adam import adam

from fedveil.core.randomness import Stream
from fedveil.models import parameters as weights
from fedveil.models.local.batches import batch_size_of, is_plain, steps_of
from fedveil.models.local.correction import Correction
from fedveil.models.local.inputs import device_of
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters
from fedveil.simulations.attacks.labels import read
from fedveil.simulations.attacks.labels import suits as shows_labels

ITERATIONS = 1000
RESTARTS = 2  # searches from other random images; the one that matches best counts
STEP = 0.1  # initial, of pixel values and of labels' logits
SURE = 0.9  # initial probability of the labels that were read
EIGHTHS = (3, 5, 7)  # of the iterations, after which steps fall to a tenth; the first also fixes the labels
ELSEWHERE = 1e-3  # share of a first layer's change outside the images' space, above which it holds more than them
SMOOTH = 1e-3  # weight of total variation beside the angle
REPLAYED = 25  # local steps at most: memory and time grow with them
TOGETHER = 16  # observations at once: more take no less time each
MANY = 32  # images at once, of which few are found on a trained model

Labels = Callable[[Observation, Known, Stream], np.ndarray]


@dataclass(frozen=True)
class Work:
    """The local training that is assumed: steps of plain SGD on batches of the images.

    batches: of each step, the position of its first image and one past its last; every epoch takes the same order, as
        the client's is not known
    rate: the learning rate; loss: its kind
    """

    batches: tuple[tuple[int, int], ...]
    rate: float
    loss: str


def match(
    observations: Sequence[Observation],
    known: Known,
    streams: Sequence[Stream],
    labels: Labels = read,
    iterations: int = ITERATIONS,
) -> list[np.ndarray]:
    """Search for the images behind several observations at once; return float32 [n, *shape] for each.

    observations: alike in their number of examples, in `work_of`, and in whether there is a `span`; each has its stream
    labels: (observation, what is known, stream) -> how many images of each class there are, int64 [classes]
    """
    device, shape = device_of(known.network), known.task.shape
    work, n = work_of(observations[0]), observations[0].examples or 0
    start = _stack([observation.before or {} for observation in observations], device)
    seen = _stack([descent(observation) for observation in observations], device)
    spans = [span(observation, known) for observation in observations]
    base: Tensor | None = None
    if not any(each is None for each in spans):  # compute in the coordinates of that space
        stacked = np.stack([each for each in spans if each is not None]).astype(np.float32)
        base = torch.from_numpy(stacked).to(device).repeat_interleave(RESTARTS, 0)  # [R, n, pixels]
        first = next(iter(start))
        start[first], seen[first] = start[first] @ base.mT, seen[first] @ base.mT

    def coordinates(images: Tensor) -> Tensor:
        return images if base is None else images.flatten(2) @ base.mT

    counts = [labels(observation, known, stream) for observation, stream in zip(observations, streams, strict=True)]
    own = np.stack([np.repeat(np.eye(len(count)), count, axis=0) for count in counts])
    guessed = torch.from_numpy(SURE * own + (1 - SURE) / own.shape[-1]).float().log().to(device)
    classes = guessed.repeat_interleave(RESTARTS, 0)  # logits, [R, n, classes]
    draws = [stream.generator("gradient matching").random((RESTARTS, n, *shape)) for stream in streams]
    images = torch.from_numpy(np.concatenate(draws).astype(np.float32)).to(device)  # [R, n, *shape]
    size = _dot(seen, seen).sqrt()
    for tensor in start.values():
        tensor.requires_grad_()

    def angle(images: Tensor, classes: Tensor) -> Tensor:
        moved = replay(known.network, start, coordinates(images), classes.softmax(-1), work)
        return 1 - _dot(moved, seen) / (_dot(moved, moved).sqrt() * size + 1e-12)  # [R]

    means, squares = ([torch.zeros_like(images), torch.zeros_like(classes)] for _ in range(2))
    taken = [torch.zeros((), device=device) for _ in range(2)]
    with weights.kept(known.network):
        known.network.eval()
        for i, step in enumerate(_steps(iterations)):
            searched = [images.requires_grad_(), classes.requires_grad_()]
            slopes = torch.autograd.grad((angle(*searched) + SMOOTH * variation(images)).sum(), searched)
            images, classes = images.detach(), classes.detach()
            if i == iterations * EIGHTHS[0] // 8:
                sure = F.one_hot(classes.argmax(-1), classes.shape[-1]).bool()
                classes = torch.where(sure, 0.0, -torch.inf)
            adam(
                [images, classes], [slopes[0].sign(), slopes[1]], means, squares, [], taken, fused=True, amsgrad=False, lr=step,
                beta1=0.9, beta2=0.999, eps=1e-12, weight_decay=0.0, maximize=False,
            )  # fmt: skip
            if base is not None:
                images = (coordinates(images) @ base).view_as(images)
            images.clamp_(0, 1)
        misfit = angle(images, classes).detach()
    best = misfit.view(len(observations), RESTARTS).argmin(1)
    return [images[i * RESTARTS + int(k)].cpu().numpy() for i, k in enumerate(best)]


def replay(
    network: nn.Module, start: dict[str, Tensor], images: Tensor, classes: Tensor, work: Work
) -> dict[str, Tensor]:
    """Return how far weights descend by the steps of `work`, differentiable in images and labels, for R trials at once.

    start: each [R, ...], requiring gradients; images: [R, n, ...]; classes: how likely each label is, [R, n, classes]
    Returns each [R, ...].
    """

    def outputs(own: dict[str, Tensor], inputs: Tensor) -> Tensor:
        logits: Tensor = functional_call(network, own, (inputs,))
        return logits

    moved: dict[str, Tensor] = {}
    now = start
    for first, end in work.batches:
        logits = vmap(outputs)(now, images[:, first:end])  # [R, b, classes]
        # the trials share no weights, so that the gradient of the sum is that of each mean
        total = losses(logits, classes[:, first:end], work.loss).mean(1).sum()
        slopes = torch.autograd.grad(total, list(now.values()), create_graph=True, materialize_grads=True)
        steps = {name: work.rate * slope for name, slope in zip(now, slopes, strict=True)}
        moved = {name: moved[name] + step for name, step in steps.items()} if moved else steps
        now = {name: tensor - moved[name] for name, tensor in start.items()}
    return moved


def losses(logits: Tensor, classes: Tensor, kind: str) -> Tensor:
    """Return the loss of each example, [...], for logits [..., classes or 1] and shares of classes [..., classes].

    For shares of 0 and 1 it is the loss of `models/local/losses.py`.
    """
    single = logits.shape[-1] == 1
    logits = F.pad(logits, (1, 0)) if single else logits  # one logit: the second class', less the first's
    if kind == "cross_entropy":
        return -(classes * logits.log_softmax(-1)).sum(-1)
    off = (logits.softmax(-1) - classes).square().sum(-1)
    return off / 2 if single else off


def work_of(observation: Observation) -> Work:
    """Return the steps to replay: the client's where they are known and few, else one step with all images."""
    training, n = observation.training, observation.examples or 0
    kind = training.loss if training else "cross_entropy"
    steps = steps_of(n, training) if training and _is_delta(observation) else 1
    if training is None or not 1 < steps <= REPLAYED:
        return Work(((0, n),), 1.0, kind)
    width = batch_size_of(n, training)
    each = math.ceil(n / width)
    starts = [step % each * width for step in range(steps)]
    return Work(tuple((begin, begin + width) for begin in starts), training.learning_rate, kind)


def descent(observation: Observation) -> Parameters:
    """Return what was seen in a gradient's direction: a gradient itself, or the weights before less those after."""
    assert observation.update is not None  # the `needs` of every caller ask for it
    sign = 1.0 if observation.kind == "gradient" else -1.0
    return {name: sign * array for name, array in observation.update.items()}


def span(observation: Observation, known: Known) -> np.ndarray | None:
    """Return orthonormal directions that span the images, float64 [n, pixels], from the change of a dense first layer.

    Returns None where the network does not start with such a layer, where its change could have no more than n
    directions, or where it has more than the images' (by noise or Adam).
    """
    layers = list(known.network.children())[:2] if type(known.network) is nn.Sequential else []
    if [type(layer) for layer in layers] != [nn.Flatten, nn.Linear]:
        return None
    change, n = next(iter((observation.update or {}).values())), observation.examples or 0
    if n >= min(change.shape):
        return None
    _, sizes, directions = np.linalg.svd(change, full_matrices=False)
    if (sizes[n:] ** 2).sum() > ELSEWHERE * (sizes**2).sum():
        return None
    held: np.ndarray = directions[:n]
    return held


def variation(images: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels, [R], of images [R, n, channels, height, width].

    Rudin et al. 1992 (total variation).
    """
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    right = (images[..., :, 1:] - images[..., :, :-1]).abs()
    return down.mean((1, 2, 3, 4)) + right.mean((1, 2, 3, 4))


def _steps(iterations: int) -> list[float]:
    """Return the step of each iteration, which falls to a tenth after 3/8, 5/8 and 7/8 of them (the authors' code)."""
    falls = [iterations * eighths // 8 for eighths in EIGHTHS]
    return [STEP * 0.1 ** sum(i >= fall for fall in falls) for i in range(iterations)]


def _stack(all_arrays: Sequence[Parameters], device: torch.device) -> dict[str, Tensor]:
    """Stack the weights of several observations, each repeated for its searches: float32, each [R, ...]."""
    stacked = {name: np.stack([arrays[name] for arrays in all_arrays]).astype(np.float32) for name in all_arrays[0]}
    return {name: torch.from_numpy(a).to(device).repeat_interleave(RESTARTS, 0) for name, a in stacked.items()}


def _dot(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """Return the inner product of weights of R trials, [R]."""
    return torch.stack([(one[name] * other[name]).flatten(1).sum(1) for name in one]).sum(0)


def _is_delta(observation: Observation) -> bool:
    return observation.kind == "delta" and observation.clients == 1


def run(observation: Observation, known: Known, stream: Stream, *, iterations: int = ITERATIONS) -> np.ndarray:
    """Return the images behind one observation, float32 [n, *shape]."""
    return match([observation], known, [stream], iterations=iterations)[0]


def run_many(
    observations: Sequence[Observation],
    known: Known,
    streams: Sequence[Stream],
    *,
    iterations: int = ITERATIONS,
    together: int = TOGETHER,
) -> list[np.ndarray]:
    """Return the images behind each observation, float32 [n, *shape] each.

    Those alike are searched for at once, at most `together`.
    """
    alike: dict[tuple[int | None, Work, bool], list[int]] = {}
    for i, observation in enumerate(observations):
        kind = observation.examples, work_of(observation), span(observation, known) is None
        alike.setdefault(kind, []).append(i)
    found: dict[int, np.ndarray] = {}
    for group in alike.values():
        for first in range(0, len(group), together):
            some = group[first : first + together]
            images = match([observations[i] for i in some], known, [streams[i] for i in some], iterations=iterations)
            found |= zip(some, images, strict=True)
    return [found[i] for i in range(len(observations))]


def suits(known: Known) -> str | None:
    """Return why nothing can be searched for, or None: the data must be images, and the last bias show their labels."""
    if known.task.kind != "images":
        return f"the data are {known.task.kind}, and it searches for images; take a preset of images, such as mnist-mlp"
    return shows_labels(known)


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the search, the worst first, or None."""
    training, n = observation.training, observation.examples or 0
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}': its steps are no gradients, and nothing is found by matching them"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in known.network.modules()):
        return "which units a client's dropout dropped is not known, and next to nothing is found"
    if n >= MANY:
        return f"{n} images at once: few are found, and on a trained model next to none"
    if training is None:
        return "how clients train is not known: their local steps are taken for one, and images come out blurred if it was more"
    steps = steps_of(n, training) if _is_delta(observation) else 1
    if steps > REPLAYED:
        return f"{steps} local steps are too many to replay, and are taken for one: a blur at best"
    if steps > 1 and not is_plain(training, Correction(training.proximal_mu)):
        return "momentum, weight decay, clipping and a proximal term are left out where local steps are replayed"
    if steps > 1 and batch_size_of(n, training) < n:
        return "in which order a client saw its images is not known, and the replayed steps take one of many"
    return None


MATCHING = Attack(
    run=run,
    many=run_many,
    recovers="images",
    needs=("update", "examples"),
    suits=suits,
    warn=warn,
    cost="seconds; minutes for many images or local steps",
    cites="Geiping et al. 2020, Inverting Gradients (2003.14053)",
)
