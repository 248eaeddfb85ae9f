"""Images, read from the update of a dense first layer.

For one example x, dW = d x^T and db = d, where d is the gradient of the loss in the layer's outputs. So every row of dW
divided by its entry of db is x (Phong et al. 2018, "Privacy-Preserving Deep Learning via Additively Homomorphic
Encryption", section 3). A step of SGD multiplies both by the learning rate, and several steps add up alike: both
cancel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

OUTSIDE = 0.05  # how far beyond [0, 1] a pixel of an image may be read
ALIKE = 0.02  # root mean square distance of images that look the same
AGREE = 1e-3  # root mean square distance of two readings of one image, from rounding to float32
DEAD = 1e-9  # share of the largest change; units below it count as not reached


def find(parameters: Mapping[str, np.ndarray], inputs: int) -> tuple[str, str | None] | None:
    """Return the names of the weight and the bias (None: it has none) of a dense first layer of `inputs` inputs.

    None where the first tensor is no such weight, as in a network that starts with convolutions.
    """
    names = list(parameters)
    if not names or parameters[names[0]].ndim != 2 or parameters[names[0]].shape[1] != inputs:
        return None
    has_bias = len(names) > 1 and parameters[names[1]].shape == parameters[names[0]].shape[:1]
    return names[0], names[1] if has_bias else None


def one(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the example behind an update made of one: dW^T db / |db|^2, float64 [inputs].

    weight: change or gradient, float64 [units, inputs]; bias: float64 [units]
    All zeros where the gradient did not reach the layer.
    """
    energy = float(bias @ bias)
    return weight.T @ bias / energy if energy > 0 else np.zeros(weight.shape[1])


def ratios(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the reading of each unit that was reached, dW_k / db_k: float64 [at most units, inputs].

    A reading is an image where only that image reached the unit, else a mixture of images (Geiping et al. 2020,
    "Inverting Gradients", proposition 3.1).
    """
    reached = np.abs(bias) > DEAD * np.abs(bias).max(initial=0.0)
    read: np.ndarray = weight[reached] / bias[reached, None]
    return read


def several(weight: np.ndarray, bias: np.ndarray, n: int) -> np.ndarray:
    """Return at most n different images in [0, 1] among the units' readings, the likeliest first: float64 [m, inputs].

    Readings outside [0, 1] are mixtures and come last. Of the others, those that several units agree on come first,
    then those with the most pixels at an end of the range: images are black in places, and a mixture is so only where
    all its images are. A reading that is a mixture of those already taken is left out.
    """
    read = ratios(weight, bias)
    over = np.maximum(-read, read - 1).max(axis=1, initial=0.0)
    read = np.clip(read[np.argsort(over, kind="stable")], 0, 1)
    inside = int((over <= OUTSIDE).sum())
    agree = (_distances(read[:inside]) < AGREE).sum(axis=1) > 1
    ends = ((read[:inside] < ALIKE) | (read[:inside] > 1 - ALIKE)).mean(axis=1)
    order = [*np.lexsort((-ends, ~agree)).tolist(), *range(inside, len(read))]
    taken: list[int] = []
    for i in order:
        if len(taken) < n and not _explained(read[i], read[taken]):
            taken.append(i)
    chosen: np.ndarray = read[taken]
    return chosen


def _distances(images: np.ndarray) -> np.ndarray:
    """Return the root mean square distances of all pairs, [m, m]."""
    squares = (images**2).sum(axis=1)
    between = squares[:, None] + squares[None] - 2 * images @ images.T
    distances: np.ndarray = np.sqrt(np.maximum(between, 0) / max(images.shape[1], 1))
    return distances


def _explained(image: np.ndarray, by: np.ndarray) -> bool:
    """Say whether an image is a weighted mean of others, up to `ALIKE`."""
    if len(by) == 0:
        return False
    shares = np.linalg.lstsq((by[1:] - by[0]).T, image - by[0], rcond=None)[0]
    off = image - by[0] - shares @ (by[1:] - by[0])
    return bool(np.sqrt((off**2).mean()) < ALIKE)
