"""A server that lies: it speaks to a deployed client's real entry, and keeps what a SuperNode would keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedveil.client.node.trainer import ClientProfile, TrainerReply, TrainerRequest, answer
from fedveil.core.wire.messages import ARRAYS, CONFIG, INBOX, from_parcel, to_arrays, to_parcel

MESSAGE_ID = "0" * 64


@dataclass
class DeployedClient:
    """A deployed client as its server meets it; its state persists between messages, as in a SuperNode.

    settings: the run's configuration, as the server sends it with every message
    """

    profile: ClientProfile
    settings: dict[str, Any] = field(default_factory=dict)
    state: RecordDict = field(default_factory=RecordDict)
    run_id: int = 1

    def ask(
        self,
        kind: str,
        arrays: ArrayRecord | Mapping[str, np.ndarray] | None = None,
        config: Mapping[str, Any] | None = None,
        inbox: Mapping[str, bytes] | None = None,
        **settings: Any,
    ) -> RecordDict:
        """Send a message, and return the content of the reply; raise Refused where the client refuses it.

        settings: of the run's configuration, for this message alone
        """
        outcome = self.reply(kind, arrays, config, inbox, **settings)
        if outcome.content is None:
            raise Refused(outcome.error[1], outcome.said)
        return from_parcel(outcome.content)

    def reply(
        self,
        kind: str,
        arrays: ArrayRecord | Mapping[str, np.ndarray] | None = None,
        config: Mapping[str, Any] | None = None,
        inbox: Mapping[str, bytes] | None = None,
        **settings: Any,
    ) -> TrainerReply:
        """Send a message, and return the trainer's whole answer, with what its operator alone is told."""
        content = RecordDict()
        if arrays is not None:
            content[ARRAYS] = arrays if isinstance(arrays, ArrayRecord) else to_arrays(arrays)
        content[CONFIG] = ConfigRecord(dict(config or {}))
        if inbox is not None:
            content[INBOX] = ConfigRecord(dict(inbox))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 0, 1
        message = Message(to_parcel(content), dst_node_id=self.profile.client + 1, message_type=kind)
        message.metadata.__dict__["_message_id"] = MESSAGE_ID
        given = {"experiment": "", "words": "", **self.settings, **settings}
        request = TrainerRequest(message, self.state, given, self.run_id, self.profile.client + 1)
        outcome = answer(request, self.profile)
        self.state = outcome.state
        return outcome


class Refused(Exception):
    """A client's refusal, in the words of both sides.

    reason: all that its server reads; said: what the client's operator alone is told
    """

    def __init__(self, reason: str, said: tuple[str, ...]) -> None:
        super().__init__("\n".join((reason, *said)))
        self.reason, self.said = reason, said


@contextmanager
def refused_for(words: str) -> Iterator[None]:
    """Expect a refusal whose reason, told to the client's operator alone, has these words."""
    with pytest.raises(Refused) as refused:
        yield
    assert any(words in text for text in refused.value.said), refused.value.said
