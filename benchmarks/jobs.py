"""The jobs on which FedVeil is compared, as data, and the arithmetic they take.

Each is plain federated averaging (McMahan et al. 2017) with SGD at a learning rate of 0.1 and one local epoch: an MLP
784-64-64-10 on random images, or an embedding of 4,000 words x 32 and an LSTM of 64 units on random texts of 32 words.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from fedveil.core.settings.experiment import Experiment

PIXELS, HIDDEN, CLASSES = 784, (64, 64), 10
VOCABULARY, TOKENS, EMBEDDING, UNITS = 4000, 32, 32, 64
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Job:
    """One job: a population of clients with `examples` each, and a cohort in each round, in batches of `batch_size`."""

    name: str
    population: int
    cohort: int
    batch_size: int
    examples: int
    rounds: int
    model: Literal["mlp", "lstm"]
    stresses: str


JOBS = {
    job.name: job
    for job in (
        Job("j1", 100, 10, 64, 600, 11, "mlp", "McMahan-sized clients, few steps"),
        Job("j2", 100, 10, 10, 600, 11, "mlp", "many small steps"),
        Job("j3", 1000, 100, 10, 60, 6, "mlp", "many small clients"),
        Job("j4", 100, 10, 16, 64, 11, "lstm", "text clients"),
    )
}


def experiment(job: Job) -> Experiment:
    """Return the job as an experiment; the server evaluates before the first round and after the last one only.

    It has one round more than the job: the last one, which evaluates and is not counted.
    """
    loader = "random_images" if job.model == "mlp" else "random_messages"
    sizes = {"hidden": HIDDEN} if job.model == "mlp" else {"embedding": EMBEDDING, "units": UNITS}
    return Experiment(
        name=job.name,
        data={
            "dataset": {"name": f"benchmarks.data:{loader}", "examples": job.examples},
            "clients": job.population,
            "vocabulary_size": VOCABULARY,
            "max_tokens": TOKENS,
        },
        model={"name": job.model, **sizes},
        training={"epochs": 1, "batch_size": job.batch_size, "learning_rate": LEARNING_RATE, "optimizer": "sgd"},
        federation={"rounds": job.rounds + 1, "cohort": job.cohort, "strategy": "fedavg"},
        evaluation={"every": job.rounds + 1},
    )


def plain(job: Job) -> dict[str, Any]:
    """Return the job as data for JSON, as a peer's script cannot import this file."""
    return asdict(job)


def steps(job: Job) -> int:
    """Return the optimizer steps of one client in one round."""
    return math.ceil(job.examples / job.batch_size)


def parameters(job: Job) -> int:
    """Return the number of weights of the job's network."""
    if job.model == "mlp":
        return sum(a * b + b for a, b in _layers())
    recurrent = 4 * UNITS * (EMBEDDING + UNITS) + 2 * 4 * UNITS  # PyTorch's LSTM has two biases
    return VOCABULARY * EMBEDDING + recurrent + UNITS * 2 + 2


def flops(job: Job) -> int:
    """Return the floating-point operations of the matrix products in one client's training in one round.

    A layer's product takes 2 operations for each weight and example forwards, 2 for the weights' gradient, and 2 for
    the inputs' gradient, which the first layer of the MLP does not need.
    """
    if job.model == "mlp":
        first, *others = [a * b for a, b in _layers()]
        return job.examples * (4 * first + 6 * sum(others))
    return job.examples * 6 * (TOKENS * 4 * UNITS * (EMBEDDING + UNITS) + UNITS * 2)


def _layers() -> list[tuple[int, int]]:
    sizes = (PIXELS, *HIDDEN, CLASSES)
    return list(pairwise(sizes))
