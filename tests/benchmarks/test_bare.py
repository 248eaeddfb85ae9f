"""The yardstick computes what FedVeil computes: from the same weights, with the same batches, to the same model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import bare, contest, jobs
from fedveil import run
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.local.batches import orders
from fedveil.models.networks.build import build

SMALL_MLP = replace(jobs.JOBS["j1"], population=3, cohort=3, batch_size=7, examples=24, rounds=0)
SMALL_LSTM = replace(jobs.JOBS["j4"], population=2, cohort=2, batch_size=5, examples=12, rounds=0)


def setting(job: jobs.Job, folder) -> tuple:
    """FedVeil's model after one round in which all clients train, its initial weights, and the clients' batches."""
    experiment = jobs.experiment(job)  # one round, as `rounds` is one more
    result = run(experiment, out=folder / "run")
    federated = load(experiment.data, experiment.seed)
    initial = build(federated.dataset.task, experiment.model, Stream(experiment.seed))
    clients = [federated.client(k)[0] for k in range(job.cohort)]
    streams = [Stream(experiment.seed, 1, k) for k in range(job.cohort)]
    order = orders(job.examples, experiment.training, streams)[:, 0] + job.examples * np.arange(job.cohort)[:, None]
    features = torch.from_numpy(np.concatenate([client.features.reshape(job.examples, -1) for client in clients]))
    labels = torch.from_numpy(np.concatenate([client.labels for client in clients]))
    batches = torch.from_numpy(order).split(job.batch_size, 1)
    return dict(result.model.named_parameters()), dict(initial.named_parameters()), features, labels, batches


@pytest.mark.parametrize("variant", sorted(bare.ROUNDS))
def test_the_batched_loops_give_fedveils_model(variant, tmp_path) -> None:
    trained, initial, features, labels, batches = setting(SMALL_MLP, tmp_path)
    names = [name.removesuffix(".weight") for name in initial if name.endswith("weight")]
    layers = [
        (initial[f"{name}.weight"].detach().T.contiguous(), initial[f"{name}.bias"].detach()[None]) for name in names
    ]
    found = bare.ROUNDS[variant](layers, features, labels, batches, jobs.LEARNING_RATE)
    for name, (weight, bias) in zip(names, found, strict=True):
        torch.testing.assert_close(weight.T, trained[f"{name}.weight"].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[0], trained[f"{name}.bias"].detach(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weight.T, initial[f"{name}.weight"].detach(), rtol=1e-3, atol=1e-4)


def test_the_text_loop_gives_fedveils_model(tmp_path) -> None:
    trained, initial, features, labels, batches = setting(SMALL_LSTM, tmp_path)
    network = bare.TextLSTM()
    start = {name: weight.detach() for name, weight in initial.items()}
    found = bare.one_by_one(network, start, features.long(), labels, batches, jobs.LEARNING_RATE)
    assert found.keys() == trained.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, trained[name].detach(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["lstm.weight_ih_l0"], start["lstm.weight_ih_l0"], rtol=1e-3, atol=1e-4)


def test_a_bare_job_takes_every_step_of_the_job() -> None:
    for job in jobs.JOBS.values():
        batches = bare.cohort_batches(job)
        assert len(batches) == jobs.steps(job)
        taken = torch.cat(batches, 1)
        clients = taken // job.examples
        assert (clients == clients[:, :1]).all()  # each row is one client's
        assert len(clients[:, 0].unique()) == job.cohort
        assert (taken.sort(1).values - clients * job.examples == torch.arange(job.examples)).all()


def test_the_bare_loops_are_those_that_are_started() -> None:
    assert contest.BARE["mlp"] == tuple(bare.ROUNDS)
