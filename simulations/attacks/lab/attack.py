"""The definition of an attack: its function, what it needs to see, what it recovers, its cost and its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters

Recovers = Literal["words", "sentence", "images", "labels", "members", "update"]
Need = Literal[
    "update", "single client", "single example", "training", "examples", "auxiliary", "candidates", "crafted", "counts",
    "two runs",
]  # fmt: skip

NEEDS: dict[Need, str] = {
    "update": "the model before, and weights afterwards",
    "single client": "one client's own",
    "single example": "of one example",
    "training": "the training settings",
    "examples": "the number of examples",
    "auxiliary": "examples like the clients'",
    "candidates": "the examples it is asked about",
    "crafted": "the model that it made",
    "counts": "the counts of clients' evaluation",
    "two runs": "the sums of two runs whose cohorts differ by it",
}
LACKS: dict[Need, str] = {
    "update": "saw protected bytes and no weights",
    "single client": "saw an aggregate, and no client's own update",
    "single example": "saw an update of several examples",
    "training": "does not know how clients train",
    "examples": "does not know how many examples the update was made of",
    "auxiliary": "has no examples like the clients'",
    "candidates": "has no examples to ask about",
    "crafted": "did not make the model that clients were sent",
    "counts": "heard no counts of clients' evaluation",
    "two runs": "saw one run, and no second one to compare its sum with",
}


@dataclass(frozen=True)
class Attack:
    """An attack, as its line in `core/catalog.py` names it; with settings of its own it is a part `(settings) -> Attack`.

    run: (observation, what is known, a stream for its random choices) -> what it recovers:
        words: dict of word id -> how often (int; 1 where it cannot count); sentence: list of word ids in order;
        images: float32 [n, *task.shape] in [0, 1]; labels: counts, int64 [classes];
        members: scores of `known.candidates`, float64 [n], larger for those more likely trained on
        update: the change of a client's weights, by name
        many: `run` for several observations at once, each with its stream, where that is faster
        needs: the parts of an observation, or of what is known, that it requires
        suits: returns why it cannot attack a network or a task at all; None where it can
        warn: returns what is known beforehand to spoil it; None where nothing is
    craft: (weights, what is known, stream) -> the model that a malicious server sends instead
    observer: whose eyes it has where nobody is named
    cost: how long it takes, in words; cites: its source
    """

    run: Callable[[Observation, Known, Stream], Any]
    recovers: Recovers
    needs: tuple[Need, ...]
    suits: Callable[[Known], str | None] = lambda _known: None
    warn: Callable[[Observation, Known], str | None] = lambda _observation, _known: None
    craft: Callable[[Parameters, Known, Stream], Parameters] | None = None
    many: Callable[[Sequence[Observation], Known, Sequence[Stream]], list[Any]] | None = None
    observer: str = "server"
    cost: str = ""
    cites: str = ""


def refusal(attack: Attack, observation: Observation, known: Known) -> str | None:
    """Return why an attack cannot be run on an observation; None where it can."""
    has: dict[Need, bool] = {
        "update": observation.update is not None and observation.before is not None,
        "single client": observation.clients == 1,
        "single example": observation.examples == 1,
        "training": observation.training is not None,
        "examples": observation.examples is not None,
        "auxiliary": known.auxiliary is not None,
        "candidates": known.candidates is not None,
        "crafted": observation.crafted,
        "counts": "evaluate/true-positives" in observation.metrics,
        "two runs": observation.together is not None,
    }
    missing = [need for need in attack.needs if not has[need]]
    if missing:
        return f"the observer '{observation.observer}' " + ", and ".join(LACKS[need] for need in missing)
    return attack.suits(known)


def launch(name: str, attack: Attack, observation: Observation, known: Known, stream: Stream) -> Any:
    """Return what an attack recovers from an observation; raise SettingsError where it cannot be run on it."""
    reason = refusal(attack, observation, known)
    if reason:
        raise SettingsError(f"attack '{name}': {reason}")
    return attack.run(observation, known, stream)
