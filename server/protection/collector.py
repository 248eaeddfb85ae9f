"""The collector of a round's updates, which every protection implements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from flwr.app import Message, MetricRecord

from fedveil.algorithms.algorithm import Arrays, Contribution
from fedveil.core.wire.messages import CLIENT, METRICS, WEIGHT
from fedveil.privacy.fixed_point import Parameters
from fedveil.server.exchange import metric


@dataclass(frozen=True)
class Collected:
    """The server's result of collecting a round's updates.

    contributions: of each client; or one, the mean, where the server sees no more
    sealed: the next model, where it is the encrypted sum itself
    mean: of the clients' weights where a protection opened it, before any noise of the server
    bound: the largest error of the mean from a protection's rounding, where nothing was clipped
    within: the noisy share of updates within the clients' bound, where that follows it
    """

    contributions: Sequence[Contribution] = ()
    sealed: Parameters | None = None
    mean: Parameters | None = None
    bound: float = 0.0
    within: float | None = None


Opening = Callable[[int], None]  # is told how many clients are in a sum, before anybody sees it


class UpdateCollector(Protocol):
    """Collects the updates of one round, or of one attempt at it.

    final: too much was revealed for another attempt
    """

    final: bool

    def ask(self, messages: list[Message]) -> list[Message]:
        """Return the training messages to send in place of `messages`; may exchange others first."""

    def take(self, client: int, reply: Message) -> None:
        """Take one reply as it arrives; raise ProtectionError where it cannot be used."""

    def finish(self, replies: list[Message]) -> Collected:
        """Return the result of the replies taken; raise ProtectionError where it must not be made."""


def contribution(reply: Message, weights: Arrays) -> Contribution:
    """Return a client's contribution: weights, and the numbers in its reply."""
    metrics = dict(cast(MetricRecord, reply.content[METRICS]))
    return Contribution(int(metric(reply, CLIENT)), weights, cast(float, metrics[WEIGHT]), metrics)
