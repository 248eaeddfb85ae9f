"""A job on Flower's simulation runtime (Ray): `python flower.py JOB_AS_JSON STARTED`, with flwr[simulation] and torch.

There is one worker for each core, with one thread; a client's examples stay in its worker's memory. Prints a JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

client_app = ClientApp()


class TextLSTM(nn.Module):
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


def network(model: str) -> nn.Module:
    """Return the network of a job."""
    if model == "lstm":
        return TextLSTM()
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def examples(model: str, client: int, count: int) -> tuple[Tensor, Tensor]:
    """Draw features and labels of a client."""
    rng = torch.Generator().manual_seed(client)
    if model == "lstm":
        return torch.randint(1, 4000, (count, 32), generator=rng), torch.randint(2, (count,), generator=rng)
    return torch.rand(count, 784, generator=rng), torch.randint(10, (count,), generator=rng)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one local epoch of plain SGD, as in Flower's quickstart for PyTorch."""
    torch.set_num_threads(1)
    job: Any = message.content["config"]
    received: Any = message.content["arrays"]
    net = network(job["model"])
    net.load_state_dict(received.to_torch_state_dict())
    features, labels = examples(job["model"], int(context.node_config["partition-id"]), job["examples"])
    optimizer, criterion, total = torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss(), 0.0
    for first in range(0, len(labels), job["batch_size"]):
        batch = slice(first, first + job["batch_size"])
        optimizer.zero_grad()
        loss = criterion(net(features[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item()
    metrics = MetricRecord({"train_loss": total, "num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


def main(job: dict[str, Any], started: float) -> None:
    """Run the job and print its figures."""
    from flwr.simulation import run_simulation

    ends: list[float] = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, _context: Context) -> None:
        strategy = FedAvg(
            fraction_train=job["cohort"] / job["population"],
            fraction_evaluate=0.0,
            min_train_nodes=job["cohort"],
            min_available_nodes=job["population"],
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(network(job["model"]).state_dict()),
            num_rounds=job["rounds"],
            train_config=ConfigRecord({key: job[key] for key in ("model", "batch_size", "examples")}),
            evaluate_fn=lambda _round, _arrays: ends.append(time.time()),  # called at the start and after each round
        )

    cores = os.cpu_count() or 1
    resources: Any = {"num_cpus": 1, "num_gpus": 0.0}
    start: Any = {"num_cpus": cores, "include_dashboard": False, "logging_level": "ERROR"}
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=job["population"],
        backend_config={"client_resources": resources, "init_args": start},
    )
    rounds = [after - before for before, after in pairwise(ends[1:])]
    print(json.dumps({"first_round_s": ends[1] - started, "round_s": rounds, "version": version("flwr")}))


if __name__ == "__main__":
    # by this import Ray's workers import the file once; as `__main__` it would be unpickled for each message, and each
    # client would make its examples again
    import flower

    flower.main(json.loads(sys.argv[1]), float(sys.argv[2]))
