"""Labels from the counts of clients' evaluation, which travel in the clear beside a protected update."""

from __future__ import annotations

import numpy as np

from fedveil.core.randomness import Stream
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation


def read(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Estimate how many examples of each of two classes a client trains on, int64 [2].

    Their ratio is taken from the examples that the client holds out.
    """
    told = {name.removeprefix("evaluate/"): value for name, value in observation.metrics.items()}
    positive = (told["true-positives"] + told["false-negatives"]) / told["num-examples"]
    n = int(observation.examples or told["num-examples"])
    spam = round(positive * n)
    return np.array([n - spam, spam], np.int64)


def suits(known: Known) -> str | None:
    """Return why the attack does not suit the data, or None: positives are counted only where there are two classes."""
    classes = len(known.task.classes)
    return (
        None
        if classes == 2
        else f"true positives are of two classes, and the data have {classes}; take a preset of spam"
    )


COUNTS = Attack(
    run=read,
    recovers="labels",
    needs=("counts",),
    suits=suits,
    cost="microseconds",
    cites="by definition: true positives and false negatives are all positives",
)
