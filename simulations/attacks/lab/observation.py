"""The input of an attack: what one observer saw of one round, and its prior knowledge.

The truth (whose examples they were, which words they held) is no part of it; only `scoring.py` compares with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import nn

from fedveil.core.examples import Examples, Task
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training

Parameters = Mapping[str, np.ndarray]
Kind = Literal["gradient", "delta", "aggregate", "ciphertext", "masked"]


@dataclass(frozen=True)
class Observation:
    """What an observer saw of an update, or of an aggregate of several.

    observer: a name of OBSERVERS; round: of the run, from 1
    kind: of `update`: a gradient, the change of one client's weights, or the mean change of several clients' weights;
        of `sent` where the observer has only protected bytes
    before: the model that the clients were sent, float32; None where it was a ciphertext to this observer
    update: the weights afterwards less those before, float64 (a gradient: as it is); None where it was not seen
    sent: the protected bytes
    clients: how many clients are in the update; examples: how many they trained on, None where that is not told
    metrics: numbers that travelled beside the update in the clear
    training: how clients train, with the round's learning rate; None where the threat model does not grant it
    crafted: whether `before` is a model that the observer made
    together: the mean change of the larger cohort, where `update` is the difference of two runs' sums; else None
    """

    observer: str
    round: int
    kind: Kind
    before: Parameters | None
    update: Parameters | None
    sent: bytes | None = None
    clients: int = 1
    examples: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Training | None = None
    crafted: bool = False
    together: Parameters | None = None


@dataclass(frozen=True)
class Known:
    """The prior knowledge of an attack: what is public, and what a threat model grants beside an observation.

    network: of the experiment's architecture; its weights mean nothing
    words: the word of each id, where the vocabulary is public; None where ids are hashed buckets
    auxiliary: examples like the victims', never theirs
    candidates: the examples of a membership attack, in random order; half of them were trained on
    """

    task: Task
    model: Model
    network: nn.Module
    words: tuple[str, ...] | None = None
    auxiliary: Examples | None = None
    candidates: Examples | None = None
