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
    """Collects updates in the clear, as float32, however they are encoded.

    encoding: of updates on the wire
    alike: give all clients the same weight, whatever they report
    noise: of the server, added to the sum
    sent: the model that each client was sent, during a round
    """

    encoding: str
    alike: bool = False
    noise: ServerNoise | None = None
    sent: dict[int, ArrayRecord] = field(default_factory=dict)
    final: bool = True

    def ask(self, messages: list[Message]) -> list[Message]:
        """Return the messages as they are."""
        self.sent = {m.metadata.dst_node_id - 1: cast(ArrayRecord, m.content[ARRAYS]) for m in messages}
        return messages

    def take(self, client: int, reply: Message) -> None:
        """Decode the weights of a reply in place; raise ProtectionError where they are not of the client's model."""
        record = reply.content.get(ARRAYS)
        if not isinstance(record, ArrayRecord):
            raise ProtectionError("its reply has no weights")
        reply.content[ARRAYS] = to_arrays(read_update(record, from_arrays(self.sent[client]), self.encoding))
        if self.alike:
            cast(MetricRecord, reply.content[METRICS])[WEIGHT] = 1

    def finish(self, replies: list[Message]) -> Collected:
        """Return each client's contribution, or their noisy mean as one."""
        found = [contribution(reply, from_arrays(cast(ArrayRecord, reply.content[ARRAYS]))) for reply in replies]
        if self.noise is not None and found:
            given = from_arrays(next(iter(self.sent.values())))
            found = [contribution(replies[0], self.noise.mean(given, [one.weights for one in found]))]
        self.sent = {}  # frees the models before clients evaluate the next
        return Collected(found)
