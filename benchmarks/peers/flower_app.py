"""A Flower app like Flower's quickstart for PyTorch, which notes when each part of a round was over.

The app's folder holds this file and a `pyproject.toml` whose run configuration has `job` (JSON) and `output`, the file
for a JSON list of the rounds. It needs nothing of FedVeil.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

client_app = ClientApp()
server_app = ServerApp()


class TextLSTM(nn.Module):
    """Embedding of `words` x 32, LSTM of 64 units, its last state, a linear layer: int64 [n, t] -> [n, 2]."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.output = nn.Linear(64, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits of the two classes."""
        logits: Tensor = self.output(self.lstm(self.embedding(words))[0][:, -1])
        return logits


def network(job: dict[str, Any]) -> nn.Module:
    """Return the network of a job."""
    if job["model"] == "lstm":
        return TextLSTM(job["words"])
    a, b, c, d = job["layers"]
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))


@cache
def examples(model: str, width: int, client: int, count: int) -> tuple[Tensor, Tensor]:
    """Draw features (`width` pixels or words each) and labels of a client."""
    rng = torch.Generator().manual_seed(client)
    if model == "lstm":
        return torch.randint(1, 4000, (count, width), generator=rng), torch.randint(2, (count,), generator=rng)
    return torch.rand(count, width, generator=rng), torch.randint(10, (count,), generator=rng)


def started() -> float:
    """Return when this process was started, in seconds since the epoch; Linux counts it in clock ticks from boot."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train local epochs of plain SGD."""
    ready = time.time()
    torch.set_num_threads(1)
    received: Any = message.content
    job = json.loads(received["config"]["job"])
    net = network(job)
    net.load_state_dict(received["arrays"].to_torch_state_dict())
    width = job["tokens"] if job["model"] == "lstm" else job["layers"][0]
    features, labels = examples(job["model"], width, int(context.node_config["partition-id"]), job["examples"])
    optimizer, criterion = torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss()
    for _ in range(job["epochs"]):
        for first in range(0, len(labels), job["batch_size"]):
            batch = slice(first, first + job["batch_size"])
            optimizer.zero_grad()
            criterion(net(features[batch]), labels[batch]).backward()
            optimizer.step()
    arrays = ArrayRecord(net.state_dict())
    metrics = MetricRecord({
        "num-examples": len(labels), "started": started(), "ready": ready, "trained": time.time()
    })  # fmt: skip
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class TimedFedAvg(FedAvg):
    """A FedAvg that notes when a round's replies are in, and the times that its slowest client reported."""

    rounds: list[dict[str, float]]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Note the times of a round, and aggregate as FedAvg does."""
        gathered, replies = time.time(), list(replies)
        clients: list[Any] = [reply.content["metrics"] for reply in replies if reply.has_content()]
        last = max(clients, key=lambda metrics: metrics["trained"])
        self.rounds[-1] |= {key: last[key] for key in ("started", "ready", "trained")} | {"gathered": gathered}
        self.rounds[-1]["replies"] = len(clients)
        return super().aggregate_train(server_round, replies)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the job, and write when each part of each round was over, in seconds since the epoch."""
    job = json.loads(str(context.run_config["job"]))
    clients = job["clients"]
    # clients only train, as FedVeil's do in this benchmark
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.rounds = []
    push = grid.push_messages

    def push_timed(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        pushed = push(messages)
        if messages:
            strategy.rounds.append({"pushed": time.time()})
        return pushed

    grid.push_messages = push_timed  # type: ignore[method-assign]

    def note_end(number: int, _arrays: ArrayRecord) -> None:
        if number:
            strategy.rounds[-1]["end"] = time.time()

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network(job).state_dict()),
        num_rounds=job["rounds"],
        train_config=ConfigRecord({"job": json.dumps(job)}),
        evaluate_fn=note_end,  # called at the start and after each round
    )
    output = Path(str(context.run_config["output"]))
    partial = output.with_suffix(".part")
    partial.write_text(json.dumps(strategy.rounds))
    partial.replace(output)
