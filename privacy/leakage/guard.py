"""What a client's own update reveals: fast attacks on it, compared with the client's own examples.

The guard finds only what these attacks find: an update that it does not warn of may still leak to a slower attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedveil.core.examples import Examples, Task
from fedveil.privacy.leakage import first_layer, labels, words

VISIBLE = 30.0  # dB from which on an image counts as revealed
EXACT = 100.0  # dB from which on a reading is called exact; rounding to 8 bits gives 59
BEST = 400.0  # dB, of equal images
TOGETHER = 1000  # images compared at once

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Revealed:
    """What an update reveals of the examples it was made of.

    words, images, labels: how many were read from it; of_words, of_images, of_labels: out of how many. Both are 0 where
    the network or the data have none
    decibels: peak signal-to-noise ratio of the best image read, None where none was
    """

    words: int = 0
    of_words: int = 0
    images: int = 0
    of_images: int = 0
    decibels: float | None = None
    labels: int = 0
    of_labels: int = 0

    @property
    def anything(self) -> bool:
        """Whether there is anything to warn of."""
        return self.words + self.images + self.labels > 0

    def __str__(self) -> str:
        """Write it out, as in "this update reveals 14 of 14 words and the label"."""
        parts = []
        if self.words:
            parts.append(f"{self.words} of {_many(self.of_words, 'word')}")
        if self.images and self.decibels is not None:
            if self.of_images == 1:
                how = "exactly" if self.decibels >= EXACT else "visibly"
                parts.append(f"the image {how} ({self.decibels:.0f} dB)")
            else:
                best = f"the best at {self.decibels:.0f} dB"
                parts.append(f"{self.images} of {_many(self.of_images, 'image')} ({best})")
        if self.labels:
            parts.append(
                "the label"
                if self.of_labels == 1
                else f"{self.labels} of {_many(self.of_labels, 'class', 'classes')} that it was trained on"
            )
        return "this update reveals " + (", and ".join(parts) or "nothing to the attacks that take milliseconds")


def reveals(before: Tensors, after: Tensors, examples: Examples, task: Task) -> Revealed:
    """Return what fast attacks read of a client's `examples` from the weights `before` and `after` its training.

    before, after: float32, by name, in the network's order; after: what would be sent
    """
    change = {name: after[name].astype(np.float64) - before[name] for name in before}
    said, of_words = _words(before, change, examples, task)
    visible, of_images, decibels = _images(before, change, examples, task)
    told, of_labels = _labels(before, change, examples, task)
    return Revealed(said, of_words, visible, of_images, decibels, told, of_labels)


def _words(before: Tensors, change: Tensors, examples: Examples, task: Task) -> tuple[int, int]:
    """Return how many of the client's distinct words were read, and of how many."""
    table = words.find(before, task.vocabulary_size) if task.kind == "text" else None
    if table is None:
        return 0, 0
    own = np.setdiff1d(examples.features, [words.PADDING])
    return len(np.intersect1d(words.moved(before[table], change[table]), own)), len(own)


def _images(before: Tensors, change: Tensors, examples: Examples, task: Task) -> tuple[int, int, float | None]:
    """Return how many of the client's images are visible in what was read, of how many, and dB of the best."""
    layer = first_layer.find(before, int(np.prod(task.shape))) if task.kind == "images" else None
    if layer is None or layer[1] is None:
        return 0, 0, None
    weight, bias = change[layer[0]], change[layer[1]]
    read = first_layer.one(weight, bias)[None] if len(examples) == 1 else first_layer.ratios(weight, bias)
    decibels = _decibels(np.clip(read, 0, 1), examples.features.reshape(len(examples), -1))
    visible = int((decibels >= VISIBLE).sum())
    return visible, len(examples), float(decibels.max()) if visible else None


def _labels(before: Tensors, change: Tensors, examples: Examples, task: Task) -> tuple[int, int]:
    """Return how many of the client's classes are known for sure, and of how many.

    None counts where the client has all classes, which a guess would say too, or where the reading names a class that
    the client does not have.
    """
    output = labels.find(before, len(task.classes)) if task.classes else None
    if output is None:
        return 0, 0
    own = set(examples.labels.tolist())
    read = set(labels.present(labels.per_class(-change[output])).tolist())
    return len(read) if read <= own and len(own) < len(task.classes) else 0, len(own)


def _decibels(read: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio, of a range of 1, of the reading closest to each image, float64 [n].

    All 0 where nothing was read.
    """
    decibels = np.zeros(len(images))
    if len(read) == 0:
        return decibels
    squares = (read**2).sum(axis=1)
    for first in range(0, len(images), TOGETHER):
        some = images[first : first + TOGETHER].astype(np.float64)
        nearest = (squares - 2 * some @ read.T).argmin(axis=1)
        errors = ((read[nearest] - some) ** 2).mean(axis=1)
        decibels[first : first + TOGETHER] = -10 * np.log10(np.maximum(errors, 10 ** (-BEST / 10)))
    return decibels


def _many(n: int, one: str, several: str | None = None) -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"
