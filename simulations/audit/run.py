"""An audit: an experiment's run with canaries among its clients, and what it proves about the epsilon it claims."""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, Message

from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, read_update
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.privacy.dp.accounting.guarantee import observers
from fedveil.privacy.dp.audit import epsilon_bound, epsilon_of, gaussian_bound, gaussian_estimate
from fedveil.privacy.dp.banded import bands_of, coefficients
from fedveil.server.checkpoint import State
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.round import Round
from fedveil.simulations.attacks.lab.observers import Open, opener
from fedveil.simulations.audit.canaries import Canaries
from fedveil.simulations.audit.crowd import CROWD
from fedveil.simulations.audit.examples import STUDDED, ExampleCanaries
from fedveil.simulations.run import run

CONFIDENCE = 0.95  # with which all bounds of an audit hold together
CANARIES = 4000  # clients; a tenth of it is too few to see that noise is halved
PROTECTED = 400  # where a protection makes a client cost some ten milliseconds
EXAMPLES = 1000
MEMORY = 1 << 28  # numbers of all canaries' models, at most where nobody says how many there are: a gigabyte
SUSPICIOUS = 1.25  # an estimate above so many times the claim is worth a look
# the audit without a preset, where all take part: a claim small enough for its bounds, epsilon 2.75 at delta 1e-5
USUAL: Mapping[str, Any] = {
    "federation.rounds": 4,
    "training.epochs": 1,
    "privacy.clip": 1.0,
    "privacy.noise_multiplier": 3.0,
    "privacy.noise_at": "server",
}


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    claim: epsilon at `delta`, as the run's accounting says; against: whom
    bound: of any private mechanism; bound_gaussian: of one whose trade-off curve is a Gaussian's, None where the claimed
        one's is not; both are lower bounds on epsilon that hold together with CONFIDENCE
    estimate, estimate_turns: of epsilon, with no proof, from canaries in all rounds and from those in odd ones; None where
        there is none
    steady, turns: the scores of canaries in all rounds, and in odd ones, each with the coins
    """

    experiment: Experiment
    claim: float
    delta: float
    against: str
    canaries: int
    bound: float
    bound_gaussian: float | None
    estimate: float | None
    estimate_turns: float | None
    steady: tuple[np.ndarray, np.ndarray]
    turns: tuple[np.ndarray, np.ndarray]
    seconds: float

    @property
    def refuted(self) -> bool:
        """Whether a bound exceeds the claim."""
        return max(self.bound, self.bound_gaussian or 0.0) > self.claim

    @property
    def verdict(self) -> str:
        """What the audit shows, in words."""
        most = max(self.bound, self.bound_gaussian or 0.0)
        if self.refuted:
            return (
                f"refuted: this run gives away epsilon {most:.2f} or more, and {self.claim:.2f} is claimed (confidence "
                f"{CONFIDENCE:.0%}); its clip, its noise or its accounting is wrong"
            )
        doubt = ""
        if self.estimate is not None and self.estimate > SUSPICIOUS * self.claim:
            doubt = f"; an estimate of {self.estimate:.2f} is far above that: no proof, and worth a look"
        return f"not refuted: epsilon {most:.2f} or more is shown, and {self.claim:.2f} is claimed{doubt}"

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints; null for what is not finite."""
        numbers = {
            "claim": self.claim,
            "bound": self.bound,
            "bound_gaussian": self.bound_gaussian,
            "estimate": self.estimate,
            "estimate_turns": self.estimate_turns,
        }
        return {
            **{name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()},
            "delta": self.delta,
            "against": self.against,
            "canaries": self.canaries,
            "confidence": CONFIDENCE,
            "refuted": self.refuted,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
        }


class _Reader(Observer):
    """Reads what the claim is about: each answer of a client, or else the models, with the clients' key if they have one."""

    def __init__(self, experiment: Experiment, canaries: Canaries | ExampleCanaries, folder: Path) -> None:
        self._canaries, self._encoding = canaries, experiment.communication.encoding
        privacy = experiment.privacy
        self._each = privacy.noise_at == "client" and not privacy.protected
        self._experiment, self._folder = experiment, folder

    @cached_property
    def _open(self) -> Open:
        return opener(self._folder, self._experiment)

    def replied(self, current: Round, client: int, reply: Message) -> None:
        """Score a client's own answer."""
        if self._each:
            sent = read_update(cast(ArrayRecord, reply.content[ARRAYS]), current.model, self._encoding)
            self._canaries.see_update(current.number, client, current.model, sent)

    def finished(self, current: Round, state: State) -> None:
        """Score the model that the round made."""
        if not self._each:
            before, after = self._open(current.model), self._open(current.aggregate)
            assert before is not None  # its observer has the key
            assert after is not None
            known = current.asked if self._experiment.federation.sampling == "order" else None
            self._canaries.see_model(current.number, before, after, known)


def audit(experiment: Experiment, folder: Path, *, canaries: int | None = None) -> Audit:
    """Run an experiment with canaries beside its own clients, or among their examples, and bound its epsilon from below.

    folder: a new one, for the record of the run; canaries: how many, `usual_number` without it
    Cohorts grow with the population, so that a client is sampled as often; nothing else of the settings changes.
    Raise SettingsError where the experiment claims no epsilon, or canaries do not go with it; else what `run` raises.
    """
    started = time.perf_counter()
    canaries = canaries or usual_number(experiment)
    crowd = with_canaries(experiment, canaries)
    drawn: Canaries | ExampleCanaries
    if experiment.privacy.per_example:
        drawn, adversary = ExampleCanaries.of(experiment, each_of(experiment, canaries)), None
    else:
        drawn = adversary = _clients(experiment, canaries)
    result = run(crowd, out=folder, adversary=adversary, observers=[_Reader(crowd, drawn, folder)], plots=False)
    claim = float(result.metrics["epsilon"].iloc[-1])
    return judge(experiment, claim, observers(crowd)["epsilon"], drawn, time.perf_counter() - started)


def _clients(experiment: Experiment, canaries: int) -> Canaries:
    """Draw canaries among the clients of an experiment."""
    size = size_of(experiment)
    clip = experiment.privacy.bound or 1.0  # one that adapts begins somewhere and grows as updates are longer
    clients, rounds = experiment.data.clients, experiment.federation.rounds
    return Canaries.draw(canaries, clients, rounds, size, clip, experiment.seed, mixing_of(experiment))


def mixing_of(experiment: Experiment) -> np.ndarray:
    """Return the matrix C by which the noises of a run's rounds become independent, float64 [rounds, rounds]."""
    federation = experiment.federation
    if experiment.privacy.noise != "banded":
        return np.eye(federation.rounds)
    diagonals = coefficients(bands_of(experiment.data.clients, federation.cohort, federation.rounds))
    found: np.ndarray = sum(c * np.eye(federation.rounds, k=-j) for j, c in enumerate(diagonals))
    return found


def size_of(experiment: Experiment) -> int:
    """Return how many numbers the model of an experiment has."""
    task = load(experiment.data, experiment.seed).dataset.task
    network = build(task, experiment.model, Stream(experiment.seed))
    return sum(value.numel() for value in network.parameters())


def usual_number(experiment: Experiment) -> int:
    """Return how many canaries an audit takes where nobody says: as many as are worth their time and memory."""
    if experiment.privacy.per_example:
        return EXAMPLES
    size = size_of(experiment)
    return max(1, min(PROTECTED if experiment.privacy.protected else CANARIES, size, MEMORY // size))


def each_of(experiment: Experiment, canaries: int) -> int:
    """Return how many of the canary examples of an experiment each client has."""
    return max(1, -(-canaries // experiment.data.clients))


def judge(
    experiment: Experiment, claim: float, against: str, canaries: Canaries | ExampleCanaries, seconds: float = 0.0
) -> Audit:
    """Bound and estimate epsilon from the scores of a run's canaries."""
    delta = experiment.privacy.delta
    parts = [
        (canaries.scores[chosen], canaries.included[chosen])
        for chosen in (~canaries.turns, canaries.turns)
    ]  # fmt: skip
    asked = [part for part in parts if len(part[0])]
    gaussian = is_gaussian(experiment)
    error = (1 - CONFIDENCE) / len(asked) / (2 if gaussian else 1)
    bound = max(epsilon_bound(*part, delta, error) for part in asked)
    mu = max(gaussian_bound(*part, error) for part in asked) if gaussian else None
    steady, turned = (gaussian_estimate(*part) for part in parts)
    return Audit(
        experiment=experiment,
        claim=claim,
        delta=delta,
        against=against,
        canaries=len(canaries.included),
        bound=bound,
        bound_gaussian=None if mu is None else epsilon_of(mu, delta),
        estimate=_epsilon(steady, delta),
        estimate_turns=_epsilon(turned * canaries.lost, delta),
        steady=parts[0],
        turns=parts[1],
        seconds=seconds,
    )


def is_gaussian(experiment: Experiment) -> bool:
    """Say whether the claimed epsilon is of a Gaussian mechanism's trade-off curve, which sampling in secret is not."""
    privacy, federation = experiment.privacy, experiment.federation
    if privacy.per_example:
        return experiment.training.batch_size == "full" and privacy.noise_at == "client"
    if federation.sampling == "poisson":
        return False
    known = privacy.noise_at != "server" or federation.sampling == "order"
    return known or federation.cohort >= experiment.data.clients


def _epsilon(mu: float, delta: float) -> float | None:
    return None if math.isnan(mu) else epsilon_of(mu, delta)


def with_canaries(experiment: Experiment, canaries: int) -> Experiment:
    """Return the experiment with canaries as further clients; raise SettingsError where it claims no epsilon."""
    privacy, clients, cohort = experiment.privacy, experiment.data.clients, experiment.federation.cohort
    if not privacy.noisy:
        raise SettingsError(
            "audit: the experiment adds no noise, so it claims no epsilon that could be wrong; set privacy.clip = 1.0 and "
            "privacy.noise_multiplier = 3.0, say"
        )
    tree = tomllib.loads(experiment.toml())
    for stops in ("target_accuracy", "patience"):
        tree["federation"].pop(stops, None)
    if privacy.per_example:
        data = {"name": STUDDED, "experiment": experiment.toml(), "canaries": each_of(experiment, canaries)}
        return Experiment(**{**tree, "data": {"dataset": data, "clients": clients}})
    population = clients + canaries
    if privacy.delta * population >= 1:
        raise SettingsError(
            f"--canaries {canaries}: privacy.delta = {privacy.delta:g} must be below 1 / {population:,}, as canaries are clients; "
            "use fewer canaries or a smaller delta"
        )
    tree["data"] = {"dataset": {"name": CROWD, "experiment": experiment.toml()}, "clients": population}
    tree["federation"]["cohort"] = population if cohort >= clients else max(1, round(cohort / clients * population))
    return Experiment(**tree)
