"""The server's instructions to clients in a round, and the contributions of K clients to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fedveil.client.learning.states import State
from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ATTEMPT, CLIP, MODEL_ROUND, REFERENCE, ROUND, RUN
from fedveil.privacy.defences import share
from fedveil.privacy.dp.sensitivity import in_sums, of_updates
from fedveil.privacy.plan import plan_for

Parameters = dict[str, np.ndarray]
Share = tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray] | None]  # weights, and noise to add to them


@dataclass(frozen=True)
class Sealed:
    """One client's protected update.

    blob: the bytes that travel; clipped: numbers outside the range; seconds: processor time of protecting the update
    """

    blob: bytes
    clipped: int
    seconds: float


@dataclass(frozen=True)
class Instructions:
    """The instructions of a training message to its clients.

    round: its number, from 1; learning_rate: of local training
    proximal_mu: replaces `training.proximal_mu` where the strategy sends one
    report_global_loss: also report the loss of the received model on the client's training part
    run: 16 bytes that name a protected run; reference: the examples announced for its cohort
    settings: the message's config as received, to which masks are bound
    model_round: the round that made the received model, 0 for the first model
    clip: the bound of updates in this round, where the settings leave it to the server
    """

    round: int
    learning_rate: float
    proximal_mu: float | None
    report_global_loss: bool
    run: bytes
    reference: int
    settings: Mapping[str, Any]
    model_round: int = 0
    clip: float | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any], experiment: Experiment) -> Instructions:
        """Read a message's config.

        Raise ProtectionError where the server left a value out, or asks for a round that the run has not, or for a loss
        that the run's noise does not cover.
        """
        privacy = experiment.privacy
        round_number = round_asked(config, experiment)
        if privacy.noisy and config.get("report-global-loss", False):
            raise ProtectionError("the server asks for a loss, which travels without noise, and this run has noise")
        rate = experiment.training.learning_rate
        if in_sums(privacy) and privacy.noise_at == "distributed" and number(config, "learning-rate") != rate:
            raise ProtectionError(
                f"the server asks for a learning rate of {number(config, 'learning-rate'):g}, and shares of the noise are made for "
                f"training.learning_rate = {rate:g}"
            )
        if privacy.protected and not isinstance(config.get(RUN), bytes):
            raise ProtectionError("the server's message does not name its run")
        if privacy.shows == "mean":
            number(config, ATTEMPT)
        clip = number(config, CLIP) if privacy.clip == "adaptive" else None
        if clip is not None and clip <= 0:
            raise ProtectionError(f"the server's message bounds updates by {CLIP} = {clip:g}, and a norm is above 0")
        return cls(
            round=round_number,
            learning_rate=number(config, "learning-rate"),
            proximal_mu=number(config, "proximal-mu") if "proximal-mu" in config else None,
            report_global_loss=bool(config.get("report-global-loss", False)),
            run=config.get(RUN, b""),
            reference=int(number(config, REFERENCE)) if privacy.protected else 0,
            settings=config,
            model_round=_model_round(config, round_number, skips=privacy.noisy),
            clip=clip,
        )


def round_asked(config: Mapping[str, Any], experiment: Experiment) -> int:
    """Return the round of a message; raise ProtectionError where the run has no such round."""
    asked, rounds = int(number(config, ROUND)), experiment.federation.rounds
    if not 1 <= asked <= rounds:
        raise ProtectionError(f"the server asks for round {asked} of a run with federation.rounds = {rounds}")
    return asked


def _model_round(config: Mapping[str, Any], asked: int, *, skips: bool) -> int:
    """Return the round whose model a message of round `asked` brings: the one before, or an earlier one that was the last made.

    skips: rounds with noise may make no model. Elsewhere one model is trained once, as sums of two rounds that began with it
    differ by who is in one of them alone.
    Raise ProtectionError where there is no such round.
    """
    found = int(number(config, MODEL_ROUND)) if MODEL_ROUND in config else asked - 1
    if found != asked - 1 and not (skips and 0 <= found < asked):
        raise ProtectionError(f"the server sends the model of round {found} to be trained in round {asked}")
    return found


def evaluation_asked(config: Mapping[str, Any], experiment: Experiment) -> int:
    """Return the round whose model a message asks to evaluate.

    Raise ProtectionError where the settings ask for no such evaluation: a score tells of the data.
    """
    asked, settings = round_asked(config, experiment), experiment.evaluation
    if not settings.federated or (asked % settings.every and asked != experiment.federation.rounds):
        raise ProtectionError(
            f"the server asks for an evaluation after round {asked}, and evaluation.federated = "
            f"{str(settings.federated).lower()}, evaluation.every = {settings.every}"
        )
    return asked


def number(config: Mapping[str, Any], key: str) -> float:
    """Return a number among a message's settings; raise ProtectionError where it is missing or not finite."""
    value = config.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtectionError(f"the server's message has no number '{key}'")
    return float(value)


@dataclass
class Contributions:
    """The contributions of K clients to a round, from the same model, as the steps build them.

    clients: their numbers; positions: of their messages among the round's
    given: the received model, float32 by name; weights: of the clients, each [K, ...], on the CPU
    brought: the bytes for each client alone in its message
    examples: int64 [K]; loss: float64 [K] of training; steps: int64 [K]; None where clients do not report them
    global_loss: float64 [K] of the received model, where the server asks for it
    within: bool [K]: whether an update was within `Instructions.clip` before it was clipped
    updates: of each client, to be sent; refusals: why a client sends none
    states: of each client, by the name of its key
    shares: of clients whose noise is drawn already, by position: a round that is asked again gets no other noise
    seconds: of the whole work; open_seconds: a client's share of opening the model, processor time
    """

    clients: list[int]
    instructions: Instructions
    given: Parameters
    weights: Parameters = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    brought: list[Mapping[str, Any]] = field(default_factory=list)
    examples: np.ndarray | None = None
    loss: np.ndarray | None = None
    steps: np.ndarray | None = None
    global_loss: np.ndarray | None = None
    within: np.ndarray | None = None
    updates: list[ArrayRecord | Sealed | None] = field(default_factory=list)
    refusals: list[ProtectionError | None] = field(default_factory=list)
    states: dict[str, list[State | None]] = field(default_factory=dict)
    shares: dict[int, Share] = field(default_factory=dict)
    seconds: float = 0.0
    open_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.updates = self.updates or [None] * len(self.clients)
        self.refusals = self.refusals or [None] * len(self.clients)

    def standing(self) -> list[tuple[int, int]]:
        """Return the position and number of each client that has not refused."""
        return [(k, client) for k, client in enumerate(self.clients) if self.refusals[k] is None]

    def of(self, k: int) -> Parameters:
        """Return the k-th client's weights, as views."""
        return {name: rows[k] for name, rows in self.weights.items()}

    def share(self, k: int, experiment: Experiment, *, secret: bool) -> Share:
        """Return the k-th client's weights, and its noise, for a protection's grid: `privacy.defences.share`.

        secret: the noise is drawn from the operating system's generator
        """
        if k in self.shares:
            return self.shares[k]
        stream = Stream(experiment.seed, self.instructions.round, self.clients[k])
        plan = plan_for(experiment)
        bounded = not in_sums(experiment.privacy)
        return share(of_updates(experiment), plan, self.given, self.of(k), stream, secret=secret, bounded=bounded)

    def counts(self) -> np.ndarray:
        """Return the clients' examples, int64 [K]."""
        assert self.examples is not None  # set by training, an earlier step
        return self.examples


def join(parts: Sequence[Contributions], weights: Parameters) -> Contributions:
    """Join the contributions of several chunks; `weights`: of all their clients, in this order, each [K, ...]."""
    first = parts[0]
    joined = Contributions(
        clients=[client for part in parts for client in part.clients],
        instructions=first.instructions,
        given=first.given,
        weights=weights,
        positions=[i for part in parts for i in part.positions],
        brought=[item for part in parts for item in part.brought],
        updates=[update for part in parts for update in part.updates],
        refusals=[refusal for part in parts for refusal in part.refusals],
        seconds=sum(part.seconds for part in parts),
        open_seconds=first.open_seconds,
    )
    for name in _ARRAYS:
        values = [getattr(part, name) for part in parts]
        setattr(joined, name, None if values[0] is None else np.concatenate(values))
    return joined


def split(joined: Contributions, parts: Sequence[Contributions]) -> None:
    """Give each of the joined chunks the results of its clients."""
    end = 0
    for part in parts:
        start, end = end, end + len(part.clients)
        part.updates, part.refusals = joined.updates[start:end], joined.refusals[start:end]
        for name in _ARRAYS:
            values = getattr(joined, name)
            setattr(part, name, None if values is None else values[start:end])


_ARRAYS = ("examples", "loss", "steps", "global_loss", "within")
