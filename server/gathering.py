"""How a round's updates become the next model: in the clear, as a sum of ciphertexts, or under masks that cancel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedveil.core.errors import ProtectionError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import ARRAYS, METRICS, WEIGHT, from_arrays, read_update, to_arrays
from fedveil.privacy.packing import Parameters
from fedveil.server.aggregate import as_one
from fedveil.server.ciphertexts import Ciphertexts
from fedveil.server.masked import Masked
from fedveil.server.noise import ServerNoise
from fedveil.server.side import Converse, ServerSide


class Gathering(Protocol):
    """The updates of one round, or of one attempt at it.

    final: too much was revealed for another attempt; mean: of the clients' weights, where the server opened it and the
    strategy makes another model of it; bound: the most that rounding makes the mean differ, where nothing was clipped
    """

    final: bool
    mean: Parameters | None
    bound: float

    def ask(self, messages: list[Message]) -> list[Message]:
        """The training messages to send in place of `messages`; may exchange others first."""

    def take(self, client: int, reply: Message) -> None:
        """See one reply as it arrives; raise ProtectionError where it cannot be used."""

    def finish(self, number: int, replies: list[Message]) -> Parameters | None:
        """The next model of the replies taken; None where the strategy makes none; ProtectionError where it must not be made."""


@dataclass
class Clear:
    """Updates in the clear: the strategy sees each, as float32.

    encoding: of updates on the wire; sent: the model that each client was sent, while a round goes on
    alike: clients weigh the same, whatever they say; noise: what the server adds to the sum
    """

    strategy: Strategy
    encoding: str
    alike: bool = False
    noise: ServerNoise | None = None
    sent: dict[int, ArrayRecord] = field(default_factory=dict)
    final: bool = True
    mean: Parameters | None = None
    bound: float = 0.0

    def ask(self, messages: list[Message]) -> list[Message]:
        """As they are."""
        self.sent = {m.metadata.dst_node_id - 1: cast(ArrayRecord, m.content[ARRAYS]) for m in messages}
        return messages

    def take(self, client: int, reply: Message) -> None:
        """Put the weights in the place of what travelled; raise ProtectionError where those are not of the client's model."""
        record = reply.content.get(ARRAYS)
        if not isinstance(record, ArrayRecord):
            raise ProtectionError("its reply has no weights")
        reply.content[ARRAYS] = to_arrays(read_update(record, from_arrays(self.sent[client]), self.encoding))
        if self.alike:
            cast(MetricRecord, reply.content[METRICS])[WEIGHT] = 1

    def finish(self, number: int, replies: list[Message]) -> Parameters | None:
        """As the strategy aggregates."""
        if self.noise is not None and replies:
            weights = [from_arrays(cast(ArrayRecord, reply.content[ARRAYS])) for reply in replies]
            given = from_arrays(next(iter(self.sent.values())))
            replies = [as_one(replies[0], self.noise.mean(given, weights))]
        self.sent = {}  # lets go of the models before clients evaluate the next
        aggregate, _ = self.strategy.aggregate_train(number, replies)
        return None if aggregate is None else from_arrays(aggregate)


def gather(
    strategy: Strategy,
    side: ServerSide | None,
    number: int,
    attempt: int,
    converse: Converse,
    experiment: Experiment,
    noise: ServerNoise | None,
) -> Gathering:
    """The gathering for a round; noise: what the server adds to the sum."""
    if side is None:
        return Clear(strategy, experiment.communication.encoding, experiment.privacy.noisy, noise)
    if side.context is not None:
        return Ciphertexts(side, number)
    return Masked(strategy, side, number, attempt, converse, noise)
