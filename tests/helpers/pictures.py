"""Made-up images for attacks: small, of three classes, dark in places as photographs of digits are."""

from __future__ import annotations

import numpy as np

from fedveil.core.examples import Examples, Task

TASK = Task("images", (1, 6, 6), ("a", "b", "c"))


def made_up(n: int, seed: int = 0, task: Task = TASK) -> Examples:
    """So many images, float32 in [0, 1], with random labels."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(0, 0.6, (n, *task.shape)), 0, 1).astype(np.float32)
    return Examples(pixels, rng.integers(0, len(task.classes), n))
