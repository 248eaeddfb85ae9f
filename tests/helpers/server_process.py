"""A FedVeil server in a process of its own: `python server_process.py JOB`, with Flower's messages over a socket.

It has what a server of a deployment has: the settings, server.ctx or no key at all, how many examples each client holds, and
no example. Each frame on the socket is a letter and what it brings. `m`: a message for a client, as Flower's bytes; `n`:
what was sent so far is dealt with, and the next reply is awaited; `r`: a round is over, `e`: the run is; both wait for an
answer. In between the process stands still, so that another may look into it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
import torch
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedveil import Experiment
from fedveil.core.examples import Examples, Task
from fedveil.core.metrics import MetricSet
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import Federated, Stored
from fedveil.datasets.partition.division import Partition
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.server.checkpoint import State
from fedveil.server.exchange import Row
from fedveil.server.federation import Federation, federate
from fedveil.server.nodes import ClientGrid
from fedveil.server.rounds.context import Hooks
from fedveil.server.strategies import make

log = logging.getLogger("flwr")
DIGITS = Task("images", (1, 8, 8), tuple("0123456789"))


class SocketGrid(Grid):
    """Nodes 1 to `clients`, all at the other end of a socket; replies are pulled one at a time."""

    def __init__(self, socket: Connection, clients: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        self._socket, self._clients, self._sent = socket, clients, 0

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._clients + 1)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)  # as Flower's SuperLink names it
            names.append(str(self._sent))
            self._socket.send_bytes(b"m" + message_to_proto(message).SerializeToString())
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._socket.send_bytes(b"n")
        return [message_from_proto(ProtoMessage.FromString(self._socket.recv_bytes()))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        names = list(self.push_messages(messages))
        return [next(iter(self.pull_messages(names))) for _ in names]


def without_data(experiment: Experiment, sizes: list[int]) -> Federated:
    """The digits of which each client holds so many, without any."""
    nothing = Examples(np.zeros((0, *DIGITS.shape), np.float32), np.zeros(0, np.int64))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    holdings = Stored(nothing, Partition(np.zeros(0, np.int64), offsets))
    return Federated(DataSet("digits", DIGITS, nothing, nothing), holdings, experiment.seed, 0.0)


def main(job: dict[str, Any]) -> None:
    """Serve the job's experiment.

    job: socket (its descriptor), experiment (as TOML), run (32 hexadecimal digits), sizes (examples of each client), out (the
    record), keys (the server's own, or none), plant (hexadecimal digits of a secret to keep, write and print), mistake (a
    client's key to load, and to make public as TenSEAL does; or none)
    """
    experiment, socket = Experiment.parse(job["experiment"]), Connection(job["socket"])
    planted = b"one byte off: " + bytes.fromhex(job["plant"])
    mistake = tenseal.context_from(Path(job["mistake"]).read_bytes()) if job["mistake"] else None
    if mistake is not None:
        mistake.make_context_public()

    network = build(DIGITS, experiment.model, Stream(experiment.seed))
    state = State(to_numpy(get(network)), run=job["run"])
    federated = without_data(experiment, job["sizes"])
    strategy = make(experiment, MetricSet.of(DIGITS))
    federation = Federation(experiment, federated, network, strategy, state, torch.device("cpu"))
    federation.protect(Path(job["keys"]) if job["keys"] else None)
    record = Record.create(experiment, Path(job["out"]))
    (record.folder / "planted").write_bytes(planted)
    sys.stdout.buffer.write(planted + b"\n")
    sys.stdout.flush()

    def rest(letter: bytes) -> None:
        socket.send_bytes(letter)
        socket.recv_bytes()

    def watch(row: Row, _: State) -> None:
        log.info("round %d: %s", row["round"], row)
        if row["round"]:
            rest(b"r")

    clients = ClientGrid(SocketGrid(socket, len(job["sizes"])), len(job["sizes"]))
    federate(federation, clients, record, Hooks(watch, warn=log.warning))
    rest(b"e")
    log.info("kept %d planted bytes, and %s", len(planted), "a key" if mistake else "no key")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
