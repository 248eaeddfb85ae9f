"""The jobs are the published ones: clients, examples, steps, weights, arithmetic."""

from __future__ import annotations

import math

import pytest

from benchmarks import jobs
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build

ARGUMENTS = {  # POPULATION COHORT BATCH EXAMPLES ROUNDS
    "j1": (100, 10, 64, 600, 11),
    "j2": (100, 10, 10, 600, 11),
    "j3": (1000, 100, 10, 60, 6),
    "j4": (100, 10, 16, 64, 11),
}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_a_job_is_the_published_one(name) -> None:
    job = jobs.JOBS[name]
    assert (job.population, job.cohort, job.batch_size, job.examples, job.rounds) == ARGUMENTS[name]
    experiment = jobs.experiment(job)
    assert (experiment.data.clients, experiment.federation.cohort) == ARGUMENTS[name][:2]
    assert experiment.training.batch_size == ARGUMENTS[name][2]
    assert experiment.federation.rounds == job.rounds + 1  # the last, which evaluates, is not counted
    training = experiment.training
    assert (training.epochs, training.optimizer, training.learning_rate, training.momentum) == (1, "sgd", 0.1, 0.0)
    assert (training.weight_decay, training.max_grad_norm, training.proximal_mu) == (0.0, None, 0.0)
    assert (experiment.federation.strategy.name, experiment.engine) == ("fedavg", "auto")


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_every_client_holds_as_many_examples_as_the_job_says(name) -> None:
    job = jobs.JOBS[name]
    federated = load(jobs.experiment(job).data, seed=0)
    clients = [federated.client(k)[0] for k in (0, 1, job.population - 1)]
    assert [len(client) for client in clients] == [job.examples] * 3
    assert len(federated.dataset.train) == job.population * job.examples
    shape = (1, 28, 28) if job.model == "mlp" else (jobs.TOKENS,)
    assert clients[0].features.shape == (job.examples, *shape)
    if job.model == "lstm":
        assert clients[0].features.min() > 0  # no padding, which would be skipped


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_the_network_has_the_weights_that_the_arithmetic_counts(name) -> None:
    job = jobs.JOBS[name]
    experiment = jobs.experiment(job)
    network = build(load(experiment.data, 0).dataset.task, experiment.model, Stream(0))
    assert sum(weight.numel() for weight in network.parameters()) == jobs.parameters(job)


def test_arithmetic_and_steps_agree_with_a_count_by_hand() -> None:
    images = 600 * (4 * 784 * 64 + 6 * (64 * 64 + 64 * 10))
    assert jobs.flops(jobs.JOBS["j1"]) == jobs.flops(jobs.JOBS["j2"]) == images
    assert jobs.flops(jobs.JOBS["j3"]) == images // 10
    assert jobs.flops(jobs.JOBS["j4"]) == 64 * 6 * (32 * 256 * 96 + 128)
    assert [jobs.steps(job) for job in jobs.JOBS.values()] == [10, 60, 6, 4]
    assert all(jobs.steps(job) == math.ceil(job.examples / job.batch_size) for job in jobs.JOBS.values())
