"""The trainer: the process of a deployed client that holds its data and keys, and computes, for all rounds.

`fedveil client` starts it with one end of a socket pair, which nobody else can reach, and sends it one message at a
time.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict

from fedveil.client.node.agreement import digest_in
from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import printable
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.flower import ErrorCode, act_as
from fedveil.core.wire.messages import CONFIG, METRICS, REFUSED, ROUND, SCHEMA, WEIGHT, from_parcel, to_parcel
from fedveil.privacy.homomorphic.keys import fingerprint
from fedveil.privacy.trust.manifest import UNSIGNED


@dataclass(frozen=True)
class ClientProfile:
    """The client's part in every run.

    client: its number, counted from 0; data: where its examples come from (`datasets/own/local.py`)
    keys: its folder, or none; policy: the file of its owner's policy, or none
    ledger: the file of its privacy ledger; none in tests alone
    """

    client: int
    data: str
    keys: str = ""
    policy: str = ""
    ledger: str = ""

    def node_config(self) -> dict[str, str | int | float | bool]:
        """Return the node configuration that the client's app finds in its Flower context."""
        return {
            "partition-id": self.client,
            "data": self.data,
            "keys": self.keys,
            "policy": self.policy,
            "ledger": self.ledger,
        }


@dataclass(frozen=True)
class TrainerRequest:
    """A message for the client's app, and the context of its run and node."""

    message: Message
    state: RecordDict
    run_config: dict[str, Any]
    run_id: int
    node_id: int


@dataclass(frozen=True)
class TrainerReply:
    """The answer to a request: the content of a reply, or the code and reason of an error; and the state to keep.

    said: warnings for this client's operator, which may quote its data and go to nobody else
    did: what the client did, in a line for its operator; empty for work that needs none
    """

    content: RecordDict | None
    error: tuple[int, str]
    state: RecordDict
    said: tuple[str, ...] = ()
    did: str = ""


class _Warnings(logging.Handler):
    """A log handler that keeps the app's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def handle(request: TrainerRequest, profile: ClientProfile) -> TrainerReply:
    """Let the installed app of this FedVeil answer a message."""
    from fedveil.client.app import app

    act_as(request.run_id, request.node_id, request.run_id)
    context = Context(
        run_id=request.run_id,
        node_id=request.node_id,
        node_config=profile.node_config(),
        state=request.state,
        run_config=request.run_config,
    )
    try:
        reply = app(request.message, context)
    except Exception:  # one failed message does not end the client
        traceback.print_exc()
        # an error's text may quote the client's data, so it stays in the client's log
        what = "its app failed; its own log says where"
        return TrainerReply(None, (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, what), context.state)
    if reply.has_error():
        return TrainerReply(None, (reply.error.code, reply.error.reason or ""), context.state)
    return TrainerReply(reply.content, (0, ""), context.state)


def answer(request: TrainerRequest, profile: ClientProfile) -> TrainerReply:
    """Answer a message whose content travels as a parcel, and collect the warnings."""
    try:
        content = from_parcel(request.message.content)
    except ProtectionError as error:
        told = (ErrorCode.MOD_FAILED_PRECONDITION, REFUSED)
        return TrainerReply(None, told, request.state, said=(f"refused: {error}",))
    request.message.content = content
    heard, log = _Warnings(), logging.getLogger("flwr")
    log.addHandler(heard)
    try:
        outcome = handle(request, profile)
    finally:
        log.removeHandler(heard)
    parcel = None if outcome.content is None else to_parcel(outcome.content)
    did = "" if outcome.content is None else _line(request, outcome.content, outcome.state)
    return replace(outcome, content=parcel, said=tuple(heard.said), did=did)


def _line(request: TrainerRequest, reply: RecordDict, state: RecordDict) -> str:
    """Return a line about a reply for this client's operator; empty where it is no step that a person follows.

    state: that the client keeps
    """
    kind, told = request.message.metadata.message_type, dict(cast(MetricRecord, reply.get(METRICS, {})))
    if kind == MessageType.QUERY and SCHEMA in cast(ConfigRecord, reply.get(CONFIG, {})):
        experiment = Experiment.received(str(request.run_config["experiment"]))
        digest = digest_in(state)
        signed = "" if digest == UNSIGNED else f"; manifest {fingerprint(digest)}"
        return f"{printable(experiment.name, 100)}  takes part, for {experiment.federation.rounds:,} rounds{signed}"
    if kind == MessageType.TRAIN:
        number = int(cast(int, cast(ConfigRecord, request.message.content[CONFIG])[ROUND]))
        loss = f"  loss {told['train-loss']:.4f}" if "train-loss" in told else ""
        return f"round {number}  trained on {told.get(WEIGHT, 0):,} examples in {told.get('seconds', 0):.1f} s{loss}"
    return ""


def reply_to(message: Message, outcome: TrainerReply) -> Message:
    """Make the reply to a message from the trainer's answer."""
    if outcome.content is None:
        return Message(Error(*outcome.error), reply_to=message)
    return Message(outcome.content, reply_to=message)


def command(descriptor: int, profile: ClientProfile) -> list[str]:
    """Return the command that starts a trainer, which answers on an inherited file descriptor.

    It imports nothing of the working folder (-P): a network of the owner's own must be installed beside FedVeil.
    """
    # not -m: pickled classes name this module, which -m would call __main__
    start = "from fedveil.client.node.trainer import main; main()"
    return [sys.executable, "-P", "-c", start, str(descriptor), json.dumps(asdict(profile))]


def main() -> None:
    """Answer requests until the other end is closed."""
    descriptor, settings = sys.argv[1:]
    profile = ClientProfile(**json.loads(settings))
    with Connection(int(descriptor)) as connection:
        import_module("fedveil.client.app")  # imported now, so that no round waits for it
        connection.send("ready")
        while True:
            try:
                request = cast(TrainerRequest, connection.recv())
            except EOFError:
                return
            connection.send(answer(request, profile))
