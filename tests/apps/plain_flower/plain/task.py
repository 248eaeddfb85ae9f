"""The model, the data and the local work."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Eight numbers in, three classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader, DataLoader]:
    """Each partition has its own number of examples, and its own shift, all from its number."""
    generator = torch.Generator().manual_seed(partition_id)
    n = 60 + 20 * partition_id
    x = torch.randn(n, 8, generator=generator) + partition_id / num_partitions
    y = (x @ torch.linspace(-1, 1, 24).reshape(8, 3)).argmax(dim=1)
    data = TensorDataset(x, y)
    train, test = data[: n * 3 // 4], data[n * 3 // 4 :]
    return DataLoader(TensorDataset(*train), batch_size=16), DataLoader(TensorDataset(*test), batch_size=64)


def train(net: Net, loader: DataLoader, optimizer: torch.optim.Optimizer, epochs: int) -> float:
    """Return the mean loss of the last epoch."""
    net.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
    return total / len(loader.dataset)


def test(net: Net, loader: DataLoader) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for x, y in loader:
            output = net(x)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            correct += (output.argmax(dim=1) == y).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
