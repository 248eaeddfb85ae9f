"""The bare loop: the same training in PyTorch, without a framework, for a known network.

The MLPs of a whole cohort are stacked, so that a layer of all clients is one batched matrix product. Gradients come
from autograd, or are written out by hand, with the step of SGD inside the product that makes the gradient. Text clients
train one after another with `nn.LSTM` and `torch.optim.SGD`, on one thread.

`python -m benchmarks.bare VARIANT JOB STARTED` runs a job and prints a JSON line, which also says how fast this machine
multiplies matrices.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import jobs
from benchmarks.jobs import Job
from benchmarks.memory import peak_mb

Layers = list[tuple[Tensor, Tensor]]  # (weight [in, out], bias [1, out]) of each dense layer, or [K, ...] of K clients
Round = Callable[[Layers, Tensor, Tensor, Sequence[Tensor], float], Layers]
MATRIX, PRODUCTS = 1024, 12


def by_hand(model: Layers, features: Tensor, labels: Tensor, batches: Sequence[Tensor], rate: float) -> Layers:
    """Train K clients from `model` and average them, with the gradients of a ReLU network written out.

    features: float32 [n, d]; labels: int64 [n]
    batches: of each step, the examples that each client takes, int64 [K, b]
    """
    clients = len(batches[0])
    own = [(w.expand(clients, -1, -1).clone(), b.expand(clients, -1, -1).clone()) for w, b in model]
    for batch in batches:
        inputs = [_gather(features, batch)]  # of each layer, [K, b, width]
        for weight, bias in own[:-1]:
            inputs.append(torch.baddbmm(bias, inputs[-1], weight).relu_())
        weight, bias = own[-1]
        slope = torch.baddbmm(bias, inputs[-1], weight).softmax(-1)
        slope.scatter_add_(2, labels[batch].unsqueeze(-1), slope.new_full((*batch.shape, 1), -1.0))
        slope.mul_(rate / batch.shape[1])
        for i in reversed(range(len(own))):
            weight, bias = own[i]
            below = torch.bmm(slope, weight.mT).mul_(inputs[i] > 0) if i > 0 else slope
            weight.baddbmm_(inputs[i].mT, slope, alpha=-1)
            bias.sub_(slope.sum(1, keepdim=True))
            slope = below
    return [(weight.mean(0), bias.mean(0)) for weight, bias in own]


def autograd(model: Layers, features: Tensor, labels: Tensor, batches: Sequence[Tensor], rate: float) -> Layers:
    """Train K clients and average them, as `by_hand` does, with PyTorch's gradients."""
    clients = len(batches[0])
    flat = [part.expand(clients, -1, -1).clone().requires_grad_() for layer in model for part in layer]
    for batch in batches:
        values = _gather(features, batch)
        for i in range(0, len(flat), 2):
            values = torch.baddbmm(flat[i + 1], values, flat[i])
            values = values.relu() if i + 2 < len(flat) else values
        # a sum over clients: each client's weights have the gradient of its own mean
        loss = F.cross_entropy(values.flatten(0, 1), labels[batch].flatten(), reduction="sum") / batch.shape[1]
        gradients = torch.autograd.grad(loss, flat)
        with torch.no_grad():
            torch._foreach_add_(flat, gradients, alpha=-rate)
    return [(flat[i].detach().mean(0), flat[i + 1].detach().mean(0)) for i in range(0, len(flat), 2)]


class TextLSTM(nn.Module):
    """Embedding, LSTM, mean over words, a linear layer: int64 [n, t] -> [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(jobs.VOCABULARY, jobs.EMBEDDING)
        self.lstm = nn.LSTM(jobs.EMBEDDING, jobs.UNITS, batch_first=True)
        self.output = nn.Linear(jobs.UNITS, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits of the two classes, [n, 2]."""
        logits: Tensor = self.output(self.lstm(self.embedding(words))[0].mean(1))
        return logits


def one_by_one(
    network: nn.Module,
    model: dict[str, Tensor],
    features: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    rate: float,
) -> dict[str, Tensor]:
    """Train K clients one after another from `model` and average them; arguments as of `by_hand`."""
    total = {name: torch.zeros_like(weight) for name, weight in model.items()}
    for k in range(len(batches[0])):
        network.load_state_dict(model)
        optimizer = torch.optim.SGD(network.parameters(), rate)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(features[batch[k]]), labels[batch[k]]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, weight in network.state_dict().items():
            total[name] += weight
    return {name: weight / len(batches[0]) for name, weight in total.items()}


def _gather(features: Tensor, batch: Tensor) -> Tensor:
    """Return the examples of each client's batch: [K, b, d]."""
    return features.index_select(0, batch.flatten()).view(*batch.shape, -1)


def multiplication_rate() -> float:
    """Return floating-point operations a second, the best of several products of 1024 x 1024 matrices."""
    a, best = torch.rand(MATRIX, MATRIX), float("inf")
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * MATRIX**3 / best


def dense_layers() -> Layers:
    """Return the layers of the jobs' MLP with random weights."""
    sizes = (jobs.PIXELS, *jobs.HIDDEN, jobs.CLASSES)
    return [(torch.randn(a, b) * (2 / a) ** 0.5, torch.zeros(1, b)) for a, b in pairwise(sizes)]


def cohort_batches(job: Job) -> tuple[Tensor, ...]:
    """Draw a cohort, and the order of each client's examples: int64 [K, at most batch_size] for each step."""
    cohort = torch.randperm(job.population)[: job.cohort]
    order = torch.rand(job.cohort, job.examples).argsort(1)
    return torch.split(order + cohort[:, None] * job.examples, job.batch_size, 1)


def play(job: Job, variant: str) -> list[float]:
    """Run the job's rounds; return the `time.time()` of the start and of each round's end."""
    total = job.population * job.examples
    if job.model == "mlp":
        features, labels = torch.rand(total, jobs.PIXELS), torch.randint(jobs.CLASSES, (total,))
        train, layers = ROUNDS[variant], dense_layers()
    else:
        torch.set_num_threads(1)
        features, labels = torch.randint(1, jobs.VOCABULARY, (total, jobs.TOKENS)), torch.randint(2, (total,))
        network = TextLSTM()
        weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    ends = [time.time()]
    for _ in range(job.rounds):
        batches = cohort_batches(job)
        if job.model == "mlp":
            layers = train(layers, features, labels, batches, jobs.LEARNING_RATE)
        else:
            weights = one_by_one(network, weights, features, labels, batches, jobs.LEARNING_RATE)
        ends.append(time.time())
    return ends


ROUNDS: dict[str, Round] = {"autograd": autograd, "by hand": by_hand}


def main(variant: str, name: str, started: str) -> None:
    """Run a job and print its figures."""
    torch.set_num_threads(os.cpu_count() or 1)
    rate = multiplication_rate()
    ends = play(jobs.JOBS[name], variant)
    print(json.dumps({
        "first_round_s": ends[1] - float(started),
        "round_s": [after - before for before, after in pairwise(ends[1:])],
        "memory_mb": peak_mb(),
        "flops_per_s": rate,
        "version": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
