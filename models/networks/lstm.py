"""An LSTM over words, for text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.examples import Task
from fedveil.core.settings.section import Depth, Fraction, Section, Width
from fedveil.models.networks.fields import EMBEDDING, INITIALIZATION, POOLING, Initialization

if TYPE_CHECKING:
    from torch import nn


class Lstm(Section):
    """Settings of `lstm`."""

    embedding: Width = Field(32, description=EMBEDDING)
    units: Width = Field(64, description="size of the hidden state")
    layers: Depth = Field(1, description="stacked layers")
    dropout: Fraction = Field(0.0, description="share of hidden values set to zero in training")
    pooling: Literal["mean", "last"] = Field("mean", description=POOLING)
    initialization: Initialization = Field("he", description=INITIALIZATION)


@part(Lstm, tasks=("classification of text",))
def lstm(task: Task, settings: Lstm) -> nn.Module:
    """Build word vectors, LSTM layers (Hochreiter and Schmidhuber 1997), pooling and a linear layer to the classes.

    Pooling `mean` averages the states over a text's words; `last` takes the state after its last word. Padding does not
    count. Recurrent weights start as PyTorch's do: uniform within 1/sqrt(units).
    """
    from fedveil.models.networks.initialization import initialized
    from fedveil.models.networks.recurrent import LSTM

    network = LSTM(
        task.vocabulary_size,
        len(task.classes),
        embedding=settings.embedding,
        units=settings.units,
        layers=settings.layers,
        dropout=settings.dropout,
        pooling=settings.pooling,
    )
    return initialized(network, settings.initialization)
