"""The recurrent network of `fedveil.models.networks.lstm`."""

from __future__ import annotations

from torch import Tensor, nn

from fedveil.models.networks.words import Words, pool, trim


class LSTM(nn.Module):
    """The network of `lstm`: int64 [n, t] -> [n, classes]."""

    def __init__(
        self, vocabulary: int, classes: int, *, embedding: int, units: int, layers: int, dropout: float, pooling: str
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0  # PyTorch warns about dropout where there is one layer
        self.embedding = Words(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, units, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(units, classes)
        self.pooling = pooling

    def forward(self, ids: Tensor) -> Tensor:
        """Compute logits; padding after the longest text is cut off before."""
        ids = trim(ids)
        states, _ = self.lstm(self.embedding(ids))  # [n, t, units]
        logits: Tensor = self.output(self.dropout(pool(states, ids, self.pooling)))
        return logits
