"""A server's process and all its clients, watched from outside: what a server must not learn, and whether it did."""

from __future__ import annotations

import base64
import json
import multiprocessing
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedveil import Experiment
from fedveil.client.app import app
from fedveil.client.learning import pipeline
from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.runtime import ClientRuntime, client_runtime
from fedveil.core.wire.messages import CONFIG, ROUND
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout, dequantize, flatten, quantize
from fedveil.privacy.homomorphic import seal
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.plan import make_lattice, make_plan
from fedveil.privacy.secagg import streams
from fedveil.privacy.secagg.client import SecAggClient
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.vectors import to_ring
from helpers.searching import Found, Search, can_read_memory, files, memory

CLIENTS, ROUNDS = 4, 2
LATTICES = ("ckks", "bfv")
SETTINGS = {
    "data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": ROUNDS, "model.hidden": [32],
    "training.epochs": 1, "engine": "sequential", "privacy.protection.drop_outs": 0.25, "device": "cpu",
}  # fmt: skip
SERVER = Path(__file__).with_name("server_process.py")
WAIT = 120.0  # seconds for the server to get anywhere

Moment = tuple[str, int, int]  # a stage, or "end"; a round; how many of its replies the server has dealt with
OWN = ("sealing key", "mask key", "self mask's seed")  # a client's secrets in secure aggregation
KEY_RUN = 24  # bytes of a secret of 32 that are searched for
AFTER_TWO, AFTER_ROUND, AT_END = ("train", 2, 2), ("round", 1, 0), ("end", 0, 0)


def experiment(protection: str) -> Experiment:
    """The digits over four clients, of which one may drop out."""
    given = (
        SETTINGS
        if protection == "secagg"
        else {k: v for k, v in SETTINGS.items() if k != "privacy.protection.drop_outs"}
    )
    return Experiment.preset("digits").override({**given, "privacy.protection": protection})


@dataclass(frozen=True)
class Update:
    """What a client made in a round, in the clear: float32 [P], of the model it was given, from so many examples."""

    client: int
    round: int
    weights: np.ndarray
    given: np.ndarray
    examples: int


@dataclass
class Clients:
    """All clients of a run, in this process, and everything that the server must not learn of them.

    drops: a client, and a round in which its update never arrives
    """

    experiment: Experiment
    keys: Path | None
    drops: tuple[int, int] | None = None
    updates: list[Update] = field(default_factory=list)
    maskers: dict[tuple[int, int], dict[str, bytes]] = field(default_factory=dict)  # secrets by client and round

    def __post_init__(self) -> None:
        runtime = client_runtime(self.experiment.toml(), str(self.keys or ""))
        initial = to_numpy(get(runtime.network))
        self.sizes = [int(size) for size in runtime.federated.sizes(np.arange(CLIENTS))]
        self.initial, self.layout = flatten(initial), Layout.of(initial)
        config = {"experiment": self.experiment.toml(), "keys": str(self.keys or "")}
        self._contexts = {
            node: Context(1, node, {"partition-id": node - 1, "num-partitions": CLIENTS}, RecordDict(), config)
            for node in range(1, CLIENTS + 1)
        }

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Remember what the clients make, on its way through them."""

        def remember(_: ClientRuntime, made: Contributions) -> None:
            weights, number = flatten(made.of(0)), made.instructions.round
            update = Update(made.clients[0], number, weights, flatten(made.given), int(made.counts()[0]))
            self.updates.append(update)

        after = next(i for i, step in enumerate(pipeline.STEPS) if step.name == "train") + 1
        steps = [*pipeline.STEPS[:after], pipeline.Step("remember", remember), *pipeline.STEPS[after:]]

        begin = SecAggClient.begin

        def begun(session: Session, client: int, *rest: Any) -> SecAggClient:
            masker = begin(session, client, *rest)
            own = dict(zip(OWN, (masker._sealing, masker._masking, masker._seed), strict=True))
            self.maskers[client, session.round] = own | {"session": session.digest}
            return masker

        monkeypatch.setattr(pipeline, "STEPS", steps)
        monkeypatch.setattr(SecAggClient, "begin", begun)

    def reply(self, message: Message) -> Message:
        """What a client answers, or that it is gone."""
        client = message.metadata.dst_node_id - 1
        reply = app(message, self._contexts[client + 1])
        if message.metadata.message_type == "train" and self.drops == (client, message.content[CONFIG][ROUND]):
            assert not reply.has_error()
            return Message(Error(1, "gone"), reply_to=message)
        return reply

    def forms(self, update: Update) -> dict[str, bytes]:
        """An update in each form that it has at its client before it is protected."""
        forms = {
            "float32": update.weights, "float64": update.weights.astype(np.float64),
            "difference, float32": update.weights - update.given,
        }  # fmt: skip
        if self.experiment.privacy.protection.name != "none":
            plan = make_plan(self.experiment.privacy, CLIENTS)
            values, _ = quantize(update.weights, update.examples, sum(self.sizes), plan.grid, self.layout)
            numbers = np.concatenate([[update.examples, 1], values])
            forms |= {"on the grid, int64": numbers, "on the grid, float64": numbers * plan.grid.step}
            forms |= {"in the ring, uint32": to_ring(values, update.examples)}
            if plan.lattice is not None and plan.lattice.scheme == "bfv":
                even = np.concatenate([numbers, np.zeros(len(numbers) % 2, np.int64)])
                forms["in slots, int64"] = even[0::2] + (even[1::2] << plan.lattice.field_bits)
        about = f"update of client {update.client}, round {update.round}, "
        return {about + name: value.tobytes() for name, value in forms.items()}

    def all_forms(self) -> dict[str, bytes]:
        """Every update so far in every form."""
        return {name: form for update in self.updates for name, form in self.forms(update).items()}

    def first_forms(self) -> list[bytes]:
        """The first model, which everybody makes from the seed, in the forms of an update of each client."""
        made = [Update(k, 0, self.initial, self.initial, size) for k, size in enumerate(self.sizes)]
        return [form for update in made for form in self.forms(update).values()]

    def mean(self, number: int) -> np.ndarray:
        """The model of a round, float32 [P]: of all but the client that dropped out."""
        plan, reference = make_plan(self.experiment.privacy, CLIENTS), sum(self.sizes)
        stayed = [u for u in self.updates if u.round == number and (u.client, number) != self.drops]
        total = sum(quantize(u.weights, u.examples, reference, plan.grid, self.layout)[0] for u in stayed)
        return dequantize(total, sum(u.examples for u in stayed), reference, plan.grid)

    def small_secrets(self) -> dict[str, bytes]:
        """Of secure aggregation, what the server must not have: of who stayed the keys, of who dropped out the seed."""
        hidden = {}
        for (client, number), own in self.maskers.items():
            about = f"client {client}, round {number}: "
            dropped = (client, number) == self.drops
            hidden[about + "sealing key"] = own["sealing key"]
            hidden[about + "self mask's seed" if dropped else about + "mask key"] = (
                own["self mask's seed"] if dropped else own["mask key"]
            )
            stayed = [k for (k, n) in self.maskers if n == number and k != client and (k, n) != self.drops]
            for peer in [] if dropped else stayed:
                public = streams.public_key(self.maskers[peer, number]["mask key"])
                agreed = streams.agree(streams.agreement(own["mask key"]), public, peer)
                hidden[f"{about}agreed with {peer}"] = agreed
                hidden[f"{about}mask's key with {peer}"] = streams.pair_key(agreed, own["session"], client, peer)
        written = {f"{name}, {form}": value for name, raw in hidden.items() for form, value in as_text(raw).items()}
        whole = {f"{name}, a number of Python's": _digits(raw) for name, raw in hidden.items()}
        return hidden | written | whole


def as_text(raw: bytes) -> dict[str, bytes]:
    """Bytes as logs and JSON would hold them; base64 from each of the three places where it may begin."""
    written = {
        f"base64 from {start}": base64.b64encode(raw[start : start + (len(raw) - start) // 3 * 3]) for start in range(3)
    }
    return {"hexadecimal": raw.hex().encode(), **written}


def _digits(raw: bytes) -> bytes:
    """How Python holds a number in memory: 30 bits in each 4 bytes."""
    number = int.from_bytes(raw, "big")
    return b"".join((number >> shift & 2**30 - 1).to_bytes(4, "little") for shift in range(0, 8 * len(raw), 30))


def key_forms(secret: bytes, degree: int) -> dict[str, bytes]:
    """A lattice's secret key as TenSEAL and SEAL write it, and its coefficients under both primes, whole and trimmed."""
    body, _ = seal._open(secret, 2**22)
    coefficients = np.frombuffer(body[-2 * 8 * degree :], np.uint64)
    assert 2**30 < coefficients.max() < 2**60  # these, and no others' bytes
    trimmed = {f"coefficients in {width} bytes": seal.trim(coefficients, width).tobytes() for width in (5, 6, 7)}
    forms = {"TenSEAL's": secret, "SEAL's": body, **trimmed}  # SEAL's ends in the coefficients
    written = {
        f"{name}, {form}": text for name in ("TenSEAL's", "SEAL's") for form, text in as_text(forms[name]).items()
    }
    return {f"secret key, {name}": form for name, form in (forms | written).items()}


def secret_key(context: bytes) -> bytes:
    """The secret key in a TenSEAL context, as it is written there."""
    (private,) = seal.read_context(context)[3]
    return dict(seal.read_fields(private))[1]


@dataclass
class Server:
    """A server's process, what it was sent, and the folder where it keeps and says things."""

    clients: Clients
    folder: Path
    planted: bytes
    process: subprocess.Popen[bytes]
    socket: Connection
    messages: list[bytes] = field(default_factory=list)

    def moments(self) -> Iterator[Moment]:
        """Play the clients to the end of the run; at each moment of these the server stands still."""
        waiting: list[Message] = []
        done: Counter[tuple[str, int]] = Counter()
        rounds = 0
        while frame := self._frame():
            if frame[:1] == b"m":
                waiting.append(message_from_proto(ProtoMessage.FromString(frame[1:])))
            elif frame[:1] == b"n":
                message = waiting.pop(0)
                stage = message.metadata.message_type.rpartition(".")[2]
                number = int(message.content[CONFIG][ROUND]) if CONFIG in message.content else 0
                yield stage, number, done[stage, number]
                done[stage, number] += 1
                self.messages.append(message_to_proto(self.clients.reply(message)).SerializeToString())
                self.socket.send_bytes(self.messages[-1])
            else:
                rounds += frame == b"r"
                yield ("round", rounds, 0) if frame == b"r" else AT_END
                self.socket.send_bytes(b"go on")
        assert self.process.wait(WAIT) == 0, self.said()

    def _frame(self) -> bytes:
        assert self.socket.poll(WAIT), self.said()
        try:
            return self.socket.recv_bytes()
        except EOFError:
            return b""

    def said(self) -> str:
        """All that the server wrote to its standard output and error."""
        return (self.folder / "log").read_bytes().decode(errors="replace")

    def look(self, *searches: Search) -> list[dict[str, list[Found]]]:
        """What each search finds in the server's memory, its files, its log among them, and in the messages to it."""
        arrived = ((f"message {i}", message) for i, message in enumerate(self.messages))
        places = {"memory": memory(self.process.pid), "files": files(self.folder), "messages": arrived}
        found: list[dict[str, list[Found]]] = [{name: [] for name in places} for _ in searches]
        for name, contents in places.items():
            for place, content in contents:
                for search, some in zip(searches, found, strict=True):
                    some[name] += search.inside(place, content)
        return found


@contextmanager
def serving(
    protection: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    drops: tuple[int, int] | None = None,
    mistake: str = "",
) -> Iterator[Server]:
    """A server that has nothing but its own folder, and clients that are remembered; `mistake`: a key that it loads."""
    settings, keys, own = experiment(protection), folder / "keys", folder / "server"
    own.mkdir()
    if protection in ("ckks", "bfv"):
        write_keys(keys, make_lattice(settings.privacy), CLIENTS)
        shutil.copytree(keys / "server", own / "keys")
    clients = Clients(settings, keys if protection in ("ckks", "bfv") else None, drops)
    clients.watch(monkeypatch)
    planted = secrets.token_bytes(96)
    ours, its = multiprocessing.Pipe()
    job = {
        "socket": its.fileno(), "experiment": settings.toml(), "sizes": clients.sizes, "out": "run",
        "run": "" if protection == "none" else secrets.token_hex(16), "keys": "keys" if protection in ("ckks", "bfv") else "",
        "plant": planted.hex(), "mistake": mistake,
    }  # fmt: skip
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(job)], cwd=own, stdout=log, stderr=log, pass_fds=[its.fileno()]
        )
    its.close()
    server = Server(clients, own, planted, process, ours)
    try:
        assert ours.poll(WAIT), server.said()  # from its first message on it waits for answers
        if process.poll() is None and not can_read_memory(process.pid):
            pytest.skip("needs to read another process's memory: Linux, and a system that lets it")
        yield server
    finally:
        process.kill()
        process.wait()
        ours.close()
