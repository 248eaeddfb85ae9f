"""A job on Apple's pfl (pfl-research): `python apple.py JOB_AS_JSON STARTED`, with pfl[pytorch] and torch.

OMP_NUM_THREADS sets its number of threads. Prints a JSON line. (A file called pfl.py would import itself.)
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Network(nn.Module):
    """A network with the loss and the metrics that pfl requires."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, inputs: Tensor, labels: Tensor, is_eval: bool = False) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        del is_eval
        value: Tensor = self.criterion(self(inputs), labels)
        return value

    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the loss, weighted by examples."""
        return {"loss": Weighted(self.loss(inputs, labels).item() * len(labels), len(labels))}


class MLP(Network):
    """An MLP 784-64-64-10 with ReLU: float32 [n, 784] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ten classes."""
        logits: Tensor = self.layers(images)
        return logits


class TextLSTM(Network):
    """Embedding of 4,000 words x 32, LSTM of 64 units, mean over words, a linear layer: int64 [n, t] -> [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4000, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.output = nn.Linear(64, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits of the two classes."""
        logits: Tensor = self.output(self.lstm(self.embedding(words))[0].mean(1))
        return logits


class RoundClock(TrainingProcessCallback):  # type: ignore[misc]
    """A callback that notes when each central iteration was done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """Note the end of a round, and let the next one begin."""
        self.ends.append(time.time())
        return False, Metrics()


def main(job: dict[str, Any], started: float) -> None:
    """Run the job and print its figures."""
    text = job["model"] == "lstm"
    network = TextLSTM() if text else MLP()
    count = job["examples"]

    @cache
    def examples(client: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(client)
        if text:
            return torch.randint(1, 4000, (count, 32), generator=rng), torch.randint(2, (count,), generator=rng)
        return torch.rand(count, 784, generator=rng), torch.randint(10, (count,), generator=rng)

    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    data = FederatedDataset(
        lambda client: Dataset(examples(client), user_id=client),
        get_user_sampler("random", list(range(job["population"]))),
    )
    clock = RoundClock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job["rounds"],
            evaluation_frequency=10**6,
            train_cohort_size=job["cohort"],
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=job["batch_size"]
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=job["batch_size"]),
        callbacks=[clock],
    )
    rounds = [after - before for before, after in pairwise(clock.ends)]
    print(json.dumps({"first_round_s": clock.ends[0] - started, "round_s": rounds, "version": version("pfl")}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), float(sys.argv[2]))
