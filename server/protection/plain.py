"""Updates in the clear: the server sees each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from flwr.app import ArrayRecord, Message, MetricRecord

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import ARRAYS, METRICS, WEIGHT, from_arrays, read_update, to_arrays
from fedveil.server.protection.collector import Collected, contribution
from fedveil.server.protection.noise import ServerNoise


@dataclass
class PlainCollector:
    """Takes updates in the clear, as float32, whatever they travelled as.

    encoding: of updates on the wire
    alike: clients weigh the same, whatever they say
    noise: what the server adds to the sum
    sent: the model that each client was sent, while a round goes on
    """

    encoding: str
    alike: bool = False
    noise: ServerNoise | None = None
    sent: dict[int, ArrayRecord] = field(default_factory=dict)
    final: bool = True

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

    def finish(self, replies: list[Message]) -> Collected:
        """Each client's contribution; or their noisy mean."""
        found = [contribution(reply, from_arrays(cast(ArrayRecord, reply.content[ARRAYS]))) for reply in replies]
        if self.noise is not None and found:
            given = from_arrays(next(iter(self.sent.values())))
            found = [contribution(replies[0], self.noise.mean(given, [one.weights for one in found]))]
        self.sent = {}  # lets go of the models before clients evaluate the next
        return Collected(found)
