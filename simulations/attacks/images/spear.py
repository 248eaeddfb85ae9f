"""A whole batch of images, exactly, from one update of a dense first layer followed by ReLU.

Dimitrov, Baader, Mueller and Vechev 2024, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning". The
update is dW = D X^T: each column of X is an image, and each column of D the loss's gradient in that image's
pre-activations. Its rank is the number of images n, so dW = L R for L of n columns, and D = L Q for an unknown Q of
n x n (low-rank decomposition). ReLU makes D sparse: an image has no gradient in a unit that it does not reach. Now and
then, n - 1 rows of L drawn at random all belong to units that one image does not reach; the vector q orthogonal to
them is then that image's column of Q up to its length (sampling). Such a q has far more zeros in L q than the n - 1 it
was made for (filtering).
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

DRAWS = 1024  # submatrices at once
MOST_DRAWS = 64 * DRAWS
MANY = 12  # limit on images for which MOST_DRAWS suffice
SURE = 6.0  # times the rounding error, above which a value is no zero
KEPT = 128  # limit on directions, of which those with the most zeros stay
EXTRA = 2  # zeros that a direction must have beyond those it was made for
SAME = 1 - 1e-4  # cosine above which two directions are the same
APART = 1e-3  # least singular value of directions that count as independent
# share of D whose zeros are where the network's ReLUs are off, from which on the batch is accepted
AGREES = 0.995


@dataclass(frozen=True)
class Layer:
    """The update of the first layer, and the weights it started from, in float64: [units, inputs] and [units]."""

    weight: np.ndarray
    bias: np.ndarray
    start: np.ndarray
    start_bias: np.ndarray


def read(observation: Observation, known: Known, stream: Stream) -> np.ndarray:
    """Return as many images as the update was made of, float32 [m, *task.shape].

    Where no batch is found, they are those of division (`first_layer.py`).
    """
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
    """Return the n images behind an update, float64 [n, inputs]; None where their directions are not found."""
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
    """Return the error of an entry of dW: what its n largest singular values leave, at least float64's rounding."""
    left = (rows.shape[0] - n) * (rows.shape[1] - n)
    beyond = float(np.sqrt((sizes[n:] ** 2).sum() / left)) if left else 0.0
    return max(beyond, float(np.finfo(np.float64).eps * sizes[0]))


def _directions(decomposed: np.ndarray, rounding: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors [k, n] orthogonal to n - 1 + `EXTRA` rows of L or more, and how many rows, int64 [k]."""
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
    """Return the direction most orthogonal to the rows of `zero`, and how many rows it is orthogonal to."""
    direction = np.linalg.svd(decomposed[zero], full_matrices=True)[2][-1]
    return direction, int((np.abs(decomposed @ direction) < SURE * rounding).sum())


def _distinct(directions: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each direction once, up to its sign: at most `KEPT`, those with the most zeros first."""
    order = np.argsort(-zeros, kind="stable")
    kept: list[int] = []
    for i in order:
        if not kept or np.abs(directions[kept] @ directions[i]).max() < SAME:
            kept.append(int(i))
        if len(kept) == KEPT:
            break
    return directions[kept], zeros[kept]


def _independent(directions: np.ndarray) -> list[int]:
    """Return the first directions of which none is a combination of those before it (greedy selection)."""
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
    """Return the images by directions [n, n], and the share of D's entries that are zero exactly where the unit is off.

    The lengths of the columns of Q follow from db = D 1 (scale recovery); X^T = Q^-1 R.
    """
    sparse = decomposed @ directions.T  # D, each column up to its length: [reached, n]
    lengths = np.linalg.lstsq(sparse, layer.bias[reached], rcond=None)[0]
    images: np.ndarray = np.linalg.solve(directions.T * lengths, right)
    on = layer.start[reached] @ images.T + layer.start_bias[reached, None] > 0
    return images, float((on == (np.abs(sparse) > SURE * rounding)).mean())


def suits(known: Known) -> str | None:
    """Return why a network's first layer reveals no batch, or None."""
    reason = division.suits(known)
    if reason:
        return reason
    leaves = [m for m in known.network.modules() if not list(m.children()) and not isinstance(m, nn.Flatten)]
    if len(leaves) < 2 or not isinstance(leaves[1], nn.ReLU):
        behind = type(leaves[1]).__name__ if len(leaves) > 1 else "nothing"
        return f"it needs ReLU right behind the first layer, and there is {behind}; take model.activation = 'relu'"
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the search, or None: it needs gradients, and its draws double with every image."""
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
