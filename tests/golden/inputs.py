"""What the golden runs read: settings files, a user's own code, and made-up data."""

from __future__ import annotations

import random

FLAT_KEYS = """name = "flat-keys"
seed = 11
[data]
dataset = "digits"
clients = 12
partition = "shards"
partition_shards = 3
validation_fraction = 0.25
[model]
hidden = [24, 12]
activation = "tanh"
normalization = "layer"
dropout = 0.1
[training]
steps = 7
batch_size = 8
learning_rate = 0.2
momentum = 0.5
schedule = "step"
schedule_rounds = 2
schedule_factor = 0.7
shift = 1
[federation]
rounds = 5
cohort = 6
strategy = "fedtrimmedavg"
trim_fraction = 0.34
[evaluation]
every = 2
federated = true
cohort = 4
"""

DEPLOYED = """name = "deployed"
seed = 5
engine = "sequential"
[data]
clients = 3
validation_fraction = 0.2
[model]
hidden = [16]
[training]
batch_size = 10
learning_rate = 0.3
[federation]
rounds = 3
cohort = 3
[evaluation]
federated = true
"""

FLOWER = """name = "flower"
engine = "sequential"
[data]
clients = 4
validation_fraction = 0.2
[federation]
cohort = 3
rounds = 2
strategy = "fedavgm"
[evaluation]
federated = true
"""

NETWORK = '''"""A network that reads no settings."""

import torch
from torch import nn


class Gated(nn.Module):
    """A layer that FedVeil has no rule for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.dense(x) * self.scale)


def gated(*_) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Gated(16), nn.Linear(16, 10))


def convolution(*_) -> nn.Module:
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    return nn.Sequential(*layers)
'''

STRATEGY = '''"""A strategy of Flower's with settings of its user's own."""

from flwr.serverapp.strategy import FedAvgM


def slow(experiment, shared):
    return FedAvgM(**shared, server_learning_rate=0.5, server_momentum=0.3)
'''

DEFENCE = '''"""A defence of a user's own, which draws random numbers."""


def halve(update, generator):
    return {name: value * (generator.random(value.shape) < 0.5) for name, value in update.items()}
'''


def messages(count: int) -> str:
    """A CSV of made-up texts, a label and a mailbox each."""
    rng, lines = random.Random(3), ["label,text,mailbox"]
    ham, spam = ("meeting", "lunch", "report", "thanks", "tomorrow"), ("prize", "winner", "cash", "free", "click")
    for i in range(count):
        label = "spam" if rng.random() < 0.3 else "ham"
        own, other = (spam, ham) if label == "spam" else (ham, spam)
        words = [rng.choice(own if rng.random() < 0.7 else other) for _ in range(rng.randint(3, 9))]
        lines.append(f"{label},{' '.join(words)} {i},box{rng.randint(1, 8)}")
    return "\n".join(lines) + "\n"


def features(count: int) -> str:
    """A CSV of made-up numbers of three classes."""
    rng, lines = random.Random(4), ["label,height,width,depth"]
    for _ in range(count):
        label = rng.choice(("cube", "plate", "stick"))
        size = {"cube": (1, 1, 1), "plate": (0.1, 2, 2), "stick": (0.2, 0.2, 3)}[label]
        lines.append(",".join([label, *(f"{value + rng.gauss(0, 0.4):.4f}" for value in size)]))
    return "\n".join(lines) + "\n"
