"""Updates in the clear: the server sees each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from flwr.app import ArrayRecord, Message, MetricRecord

from fedveil.algorithms.algorithm import Contribution
from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import ARRAYS, METRICS, WEIGHT, WITHIN, from_arrays, read_update, to_arrays
from fedveil.server.exchange import count
from fedveil.server.protection.collector import Collected, Opening, contribution
from fedveil.server.protection.noise import NoisySum


@dataclass
class PlainCollector:
    """Collects updates in the clear, as float32, however they are encoded.

    encoding: of updates on the wire
    alike: give all clients the same weight, whatever they report
    noisy: what becomes of the sum, where the server adds noise to it
    opening: is told how many clients are in the sum, before anything is made of it
    sent: the model that each client was sent, during a round
    """

    encoding: str
    alike: bool = False
    noisy: NoisySum | None = None
    opening: Opening = lambda _clients: None
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
        if self.noisy is not None and self.noisy.count is not None and count(reply, WITHIN) > 1:
            raise ProtectionError(f"its reply says {WITHIN} = {count(reply, WITHIN)}, where 0 or 1 belongs")

    def finish(self, replies: list[Message]) -> Collected:
        """Return each client's contribution, or their noisy mean as one, which is noise alone where nobody replied."""
        self.opening(len(replies))
        found = [contribution(reply, from_arrays(cast(ArrayRecord, reply.content[ARRAYS]))) for reply in replies]
        self.sent = {}  # frees the models before clients evaluate the next
        if self.noisy is None:
            return Collected(found)
        mean = self.noisy.of_updates([one.weights for one in found])
        within = None
        if self.noisy.count is not None:
            within = self.noisy.share_within(sum(count(reply, WITHIN) for reply in replies), len(replies))
        return Collected([Contribution(found[0].client if found else 0, mean, 1.0)], within=within)
