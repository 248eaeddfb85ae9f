"""A whole batch of images, exactly, from one update of a dense first layer with ReLU behind it.

Dimitrov, Baader, Mueller and Vechev 2024, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning". The update is
dW = D X^T, with an image in each column of X and the loss's gradient in each one's pre-activations in D. Its rank is
the number of images n, so dW = L R for L of n columns, and D = L Q for an unknown Q of n x n (low-rank decomposition). ReLU makes D
sparse: an image has no gradient in a unit that it does not reach. So n - 1 rows of L drawn at random are, now and then,
of units that one image does not reach, and then the vector they are orthogonal to is that image's column of Q up to its
length (sampling and filtering). It shows by many zeros in L q, far more than the n - 1 it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from fedveil.core.randomness import Stream
from fedveil.privacy.leakage import first_layer
from fedveil.simulations.attacks.images import first_layer as division
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation

DRAWS = 1024  # submatrices looked at together
MOST_DRAWS = 64 * DRAWS
MANY = 12  # images, for which MOST_DRAWS still suffice
SURE = 6.0  # times the rounding error: what is larger is no zero
KEPT = 128  # directions, those with the most zeros
EXTRA = 2  # zeros beyond those a direction was made for
SAME = 1 - 1e-4  # cosine of two readings of one direction
APART = 1e-3  # least singular value of directions that count as independent
AGREES = (
    0.995  # share of D whose zeros are where the network's ReLUs are off, from which on the batch is taken as found
)


@dataclass(frozen=True)
class Layer:
    """The update of the first layer, and the weights it started from, in float64: [units, inputs] and [units]."""

    weight: np.ndarray
    bias: np.ndarray
    start: np.ndarray
    start_bias: np.ndarray


def read(observation: Observation, known: Known, stream: Stream) -> np.ndarray:
    """As many images as the update was made of, float32 [m, *task.shape]; where it finds no batch, what division reads."""
    assert observation.before is not None
    assert observation.examples is not None
    weight, bias = division.layer_update(observation, known)
    names = first_layer.find(observation.before, weight.shape[1])
    assert names is not None
    assert names[1] is not None
    start, start_bias = (observation.before[name].astype(np.float64) for name in names if name is not None)
    layer = Layer(weight, bias, start, start_bias)
    images = batch(layer, observation.examples, stream.generator("submatrices")) if observation.examples > 1 else None
    if images is None:
        return division.read(observation, known, stream)
    return np.asarray(np.clip(images, 0, 1), np.float32).reshape(-1, *known.task.shape)


def batch(layer: Layer, n: int, rng: np.random.Generator) -> np.ndarray | None:
    """The n images behind an update, float64 [n, inputs]; None where their directions are not found."""
    reached = np.abs(layer.weight).max(axis=1) > first_layer.DEAD * np.abs(layer.weight).max(initial=0.0)
    rows = layer.weight[reached]
    if min(rows.shape) < n:
        return None
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    decomposed, rounding = left[:, :n] * sizes[:n], _rounding(rows, sizes, n)
    best, score = None, 0.0
    directions, zeros = np.zeros((0, n)), np.zeros(0, dtype=np.int64)
    for _ in range(MOST_DRAWS // DRAWS):
        more, count = _directions(decomposed, rounding, rng)
        directions, zeros = _distinct(np.vstack([directions, more]), np.concatenate([zeros, count]))
        chosen = _independent(directions)
        if len(chosen) < n:
            continue
        images, agrees = _images(layer, reached, decomposed, right[:n], directions[chosen], rounding)
        if agrees > score:
            best, score = images, agrees
        if score >= AGREES:
            break
    return best


def _rounding(rows: np.ndarray, sizes: np.ndarray, n: int) -> float:
    """The error of an entry of dW: what its n largest singular values leave, or what float64 rounds."""
    left = (rows.shape[0] - n) * (rows.shape[1] - n)
    beyond = float(np.sqrt((sizes[n:] ** 2).sum() / left)) if left else 0.0
    return max(beyond, float(np.finfo(np.float64).eps * sizes[0]))


def _directions(decomposed: np.ndarray, rounding: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [k, n] orthogonal to n - 1 rows of L and to at least `EXTRA` more, and to how many in all, int64 [k]."""
    units, n = decomposed.shape
    drawn = rng.random((DRAWS, units)).argpartition(n - 1, axis=1)[:, : n - 1]
    _, sizes, bases = np.linalg.svd(decomposed[drawn], full_matrices=True)
    directions = bases[:, -1]
    least = np.maximum(sizes[:, -1], np.finfo(np.float64).tiny)  # rows that are nearly dependent give a poor direction
    length = np.linalg.norm(decomposed, axis=1)
    allowed = SURE * rounding * (1 + length / least[:, None])  # [DRAWS, units]
    values = np.abs(directions @ decomposed.T)
    zero = (values < allowed) & (allowed < np.median(length))
    promising = zero.sum(axis=1) >= n - 1 + EXTRA
    refined = [_refined(decomposed, mask, rounding) for mask in zero[promising]]
    kept = [(direction, count) for direction, count in refined if count >= n - 1 + EXTRA]
    return np.array([d for d, _ in kept]).reshape(-1, n), np.array([c for _, c in kept], dtype=np.int64)


def _refined(decomposed: np.ndarray, zero: np.ndarray, rounding: float) -> tuple[np.ndarray, int]:
    """The direction most orthogonal to all rows that looked so, and to how many rows it is."""
    direction = np.linalg.svd(decomposed[zero], full_matrices=True)[2][-1]
    return direction, int((np.abs(decomposed @ direction) < SURE * rounding).sum())


def _distinct(directions: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each direction once, up to its sign, those with the most zeros first, at most `KEPT`."""
    order = np.argsort(-zeros, kind="stable")
    kept: list[int] = []
    for i in order:
        if not kept or np.abs(directions[kept] @ directions[i]).max() < SAME:
            kept.append(int(i))
        if len(kept) == KEPT:
            break
    return directions[kept], zeros[kept]


def _independent(directions: np.ndarray) -> list[int]:
    """The first directions of which none is a combination of those before it (greedy selection)."""
    n = directions.shape[1]
    chosen: list[int] = []
    for i in range(len(directions)):
        if np.linalg.svd(directions[[*chosen, i]], compute_uv=False)[-1] > APART:
            chosen.append(i)
        if len(chosen) == n:
            break
    return chosen


def _images(
    layer: Layer,
    reached: np.ndarray,
    decomposed: np.ndarray,
    right: np.ndarray,
    directions: np.ndarray,
    rounding: float,
) -> tuple[np.ndarray, float]:
    """The images by directions [n, n], and the share of D's entries that are zero where the unit is off, and only there.

    The lengths of the columns of Q follow from db = D 1 (scale recovery); X^T = Q^-1 R.
    """
    sparse = decomposed @ directions.T  # D, each column up to its length: [reached, n]
    lengths = np.linalg.lstsq(sparse, layer.bias[reached], rcond=None)[0]
    images: np.ndarray = np.linalg.solve(directions.T * lengths, right)
    on = layer.start[reached] @ images.T + layer.start_bias[reached, None] > 0
    return images, float((on == (np.abs(sparse) > SURE * rounding)).mean())


def suits(known: Known) -> str | None:
    """Why a network's first layer gives no batch away."""
    reason = division.suits(known)
    if reason:
        return reason
    leaves = [m for m in known.network.modules() if not list(m.children()) and not isinstance(m, nn.Flatten)]
    if len(leaves) < 2 or not isinstance(leaves[1], nn.ReLU):
        behind = type(leaves[1]).__name__ if len(leaves) > 1 else "nothing"
        return f"it needs ReLU right behind the first layer, and there is {behind}; take model.activation = 'relu'"
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """The draws it takes double with every image, and need steps that are gradients."""
    training, units = observation.training, len(next(known.network.parameters()))
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}': its steps are no gradients, and have no low rank"
    if observation.examples is not None and observation.examples >= units:
        return f"{observation.examples} images in {units} units: the update has no low rank, and no batch can be found"
    if observation.examples is not None and observation.examples > MANY:
        return f"{observation.examples} images: the draws it needs double with each; beyond {MANY} it seldom ends well"
    return None


SPEAR = Attack(
    run=read,
    recovers="images",
    needs=("update", "examples"),
    suits=suits,
    warn=warn,
    cost="seconds",
    cites="Dimitrov et al. 2024 (SPEAR)",
)
