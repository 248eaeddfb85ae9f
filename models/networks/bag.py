"""A bag of words, for text: the mean or sum of word vectors, and a linear layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.examples import Task
from fedveil.core.settings.section import Section, Width
from fedveil.models.networks.fields import EMBEDDING, INITIALIZATION, POOLING, Initialization

if TYPE_CHECKING:
    from torch import nn


class Bag(Section):
    """Settings of `bag`."""

    embedding: Width = Field(32, description=EMBEDDING)
    pooling: Literal["mean", "sum"] = Field("mean", description=POOLING)
    initialization: Initialization = Field("he", description=INITIALIZATION)


@part(Bag, tasks=("classification of text",))
def bag(task: Task, settings: Bag) -> nn.Module:
    """Build the mean or sum of a text's word vectors, followed by a linear layer to the classes.

    With `settings.embedding` = 1 and two classes there is no linear layer: each word has one number, and their sum
    or mean is the logit of the second class, as in Trask 2019, 'Grokking Deep Learning', chapter 15.
    """
    from torch import nn

    from fedveil.models.networks.initialization import initialized
    from fedveil.models.networks.words import PooledWords

    words = PooledWords(task.vocabulary_size, settings.embedding, settings.pooling)
    layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=words)
    if settings.embedding > 1 or len(task.classes) > 2:
        layers["output"] = nn.Linear(settings.embedding, len(task.classes))
    return initialized(nn.Sequential(layers), settings.initialization)
