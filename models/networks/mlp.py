"""Dense layers, for images, features, and pooled word vectors."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from fedveil.core.declaration import part
from fedveil.core.examples import Task
from fedveil.core.settings.section import Fraction, Section, Width
from fedveil.models.networks.fields import EMBEDDING, INITIALIZATION, POOLING, Initialization

if TYPE_CHECKING:
    from torch import nn


class Mlp(Section):
    """Settings of `mlp`."""

    hidden: Annotated[tuple[Width, ...], Field(strict=False, max_length=100)] = Field(
        (64, 64), description="units of each hidden layer"
    )
    activation: Literal["relu", "leaky_relu", "prelu", "elu", "sigmoid", "tanh"] = Field(
        "relu", description="after each hidden layer"
    )
    dropout: Fraction = Field(0.0, description="share of hidden values set to zero in training")
    normalization: Literal["none", "layer", "batch"] = Field("none", description="batch is refused: see its message")
    initialization: Initialization = Field("he", description=INITIALIZATION)
    embedding: Width = Field(32, description=EMBEDDING)
    pooling: Literal["mean", "sum"] = Field("mean", description=POOLING)

    @field_validator("normalization")
    @classmethod
    def _keeps_nothing(cls, given: str) -> str:
        if given == "batch":
            raise ValueError(
                "batch norm keeps running statistics of each client's own data; they are not weights, and averaging them "
                "gives a model that fits nobody. Use 'layer', which keeps none"
            )
        return given


@part(Mlp, tasks=("classification",))
def mlp(task: Task, settings: Mlp) -> nn.Module:
    """Build dense layers `settings.hidden`, each with normalization, activation and dropout, and one to the classes.

    Images and features are flattened; of text, the mean or sum of word vectors is taken. Biases start as zero, dense
    weights by `settings.initialization`:
      he: N(0, 2/fan_in) (He et al. 2015, section 2.2)
      xavier: uniform within sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 16)
      lecun: N(0, 1/fan_in) (LeCun et al. 1998, section 4.6)
      zeros: every weight is zero; all units stay alike, so nothing but the last bias learns
    """
    from torch import nn

    from fedveil.models.networks.initialization import initialized
    from fedveil.models.networks.words import PooledWords

    activations = {
        "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU, "elu": nn.ELU, "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
    }  # fmt: skip
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if task.kind == "text":
        layers["embedding"] = PooledWords(task.vocabulary_size, settings.embedding, settings.pooling)
        width = settings.embedding
    else:
        layers["flatten"] = nn.Flatten()
        width = math.prod(task.shape)
    for i, units in enumerate(settings.hidden, start=1):
        layers[f"dense{i}"] = nn.Linear(width, units)
        if settings.normalization != "none":
            layers[f"norm{i}"] = nn.LayerNorm(units)
        layers[f"activation{i}"] = activations[settings.activation]()
        if settings.dropout > 0:
            layers[f"dropout{i}"] = nn.Dropout(settings.dropout)
        width = units
    layers["output"] = nn.Linear(width, len(task.classes))
    return initialized(nn.Sequential(layers), settings.initialization)
