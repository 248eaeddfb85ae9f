"""A step of DP-SGD with Opacus' ghost clipping, in an environment of its own: Opacus installs packages that hide ours.

    python -m venv .venv-opacus
    .venv-opacus/bin/python -m pip install -c constraints.txt torch==2.13.0 opacus==1.6.0

A step takes a random batch of a fixed size, clips, adds noise and takes a step of SGD; batches are not drawn by coins.
Prints the CPU time of a step as JSON. The examples are made up, and the same for FedVeil, which imports `made_up`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np

WORDS, TOKENS, CLASSES = 4000, 64, 10


def made_up(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return examples: `images`, float32 [60000, 1, 28, 28] of ten classes, as many as MNIST's; `text`, int32 [4000, 64]
    of two classes, with as many words as SMS, of Zipf's frequencies, and padding."""
    rng = np.random.default_rng(0)
    if kind == "images":
        return rng.random((60_000, 1, 28, 28), dtype=np.float32), rng.integers(0, CLASSES, 60_000)
    n = 4000
    chances = 1 / np.arange(1, WORDS)
    words = rng.choice(np.arange(1, WORDS), (n, TOKENS), p=chances / chances.sum()).astype(np.int32)
    words[np.arange(TOKENS) >= 1 + rng.geometric(1 / 19, n)[:, None]] = 0
    return words, rng.integers(0, 2, n)


def measure(job: str, batch: int, steps: int) -> dict[str, Any]:
    """Return the median CPU time of a step, in milliseconds, and Opacus' version."""
    warnings.filterwarnings("ignore")
    import opacus  # type: ignore[import-not-found]
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # type: ignore[import-not-found]
    from opacus.layers import DPLSTM  # type: ignore[import-not-found]
    from opacus.optimizers import DPOptimizerFastGradientClipping  # type: ignore[import-not-found]
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # type: ignore[import-not-found]
    from torch import nn

    class Bag(nn.Module):
        """Mean of word vectors, one hidden layer."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(WORDS, 64, padding_idx=0)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            real = (ids != 0).unsqueeze(-1)
            return self.net((self.embedding(ids) * real).sum(1) / real.sum(1).clamp(min=1))  # type: ignore[no-any-return]

    class Lstm(nn.Module):
        """Word vectors, an LSTM, its state after the last word."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(WORDS, 32, padding_idx=0)
            self.lstm = DPLSTM(32, 64, batch_first=True)
            self.output = nn.Linear(64, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            ids = ids[:, : max(int((ids != 0).sum(1).max()), 1)]
            states, _ = self.lstm(self.embedding(ids))
            end = (ids != 0).sum(1, keepdim=True).sub(1).clamp(min=0).unsqueeze(-1)
            return self.output(states.take_along_dim(end, 1)[:, 0])  # type: ignore[no-any-return]

    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, labels = (torch.from_numpy(array) for array in made_up("images" if job == "mlp" else "text"))
    network: nn.Module
    if job == "mlp":
        features = features.flatten(1)
        network = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    else:
        network = Bag() if job == "bag" else Lstm()
    criterion = nn.CrossEntropyLoss() if job == "mlp" else nn.BCEWithLogitsLoss()
    module = GradSampleModuleFastGradientClipping(network, max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), 0.01), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch
    )
    loss = DPLossFastGradientClipping(module, optimizer, criterion)
    seconds = []
    for _ in range(steps + 2):
        began = time.process_time()
        chosen = torch.randint(len(labels), (batch,))
        x, y = features[chosen], labels[chosen]
        optimizer.zero_grad()
        loss(module(x if job == "mlp" else x.long()), y if job == "mlp" else y.float().unsqueeze(1)).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return {"ms": statistics.median(seconds[2:]) * 1e3, "version": opacus.__version__}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(json.dumps(measure(settings["job"], settings["batch"], settings["steps"])))
