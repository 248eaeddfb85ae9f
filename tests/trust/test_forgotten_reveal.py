"""A client that crashes between its answer and its memory: what it revealed, it must still know afterwards.

A SuperNode stores a run's context after the answer has left. Where it dies between the two, it starts again with the
context of before, and the client's record of what it revealed (`Revealed`) is the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from trust.liar import DeployedClient, Refused

from fedveil import Experiment
from fedveil.client.node.trainer import ClientProfile
from fedveil.core.randomness import Stream
from fedveil.core.wire.messages import BLOB, CONFIG, MANIFEST, SIGNATURES, from_sealed
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.plan import RESERVED, make_plan
from fedveil.privacy.secagg.graph import choose_degree
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.secagg.vectors import read_masked, shown
from fedveil.privacy.trust.key_folders import load_registry, new_parties
from fedveil.privacy.trust.manifest import Manifest, now, write_signatures

CLIENTS, LEAST, VICTIM, RUN = 6, 5, 3, b"R" * 16
EXPERIMENT = Experiment.preset("digits").override(
    {
        "data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": 3, "model.hidden": [8],
        "training.epochs": 1, "privacy.protection": "secagg", "privacy.protection.min_clients": LEAST,
    }
)  # fmt: skip


class LyingServer:
    """A server that has one round summed twice: of all clients, and of all but the victim."""

    def __init__(self, folder: Path, *, ledger: bool = True) -> None:
        write_keys(folder, None, CLIENTS, new_parties(CLIENTS, EXPERIMENT.privacy, ["localhost"]))
        self.registry = load_registry(folder / "server") or {}
        toml = EXPERIMENT.toml()
        ledgers = [str(folder.parent / f"client-{k + 1}.ledger") if ledger else "" for k in range(CLIENTS)]
        self.manifest = Manifest.of(RUN.hex(), toml, "", self.registry, reproducible=False, created=now())
        self.clients = [
            DeployedClient(
                ClientProfile(k, f"digits:{k + 1}/{CLIENTS}", str(folder / f"client-{k + 1}"), "", ledgers[k]),
                {"experiment": toml},
            )
            for k in range(CLIENTS)
        ]
        told = {MANIFEST: self.manifest.content}
        signed = {
            k: bytes(client.ask("query.manifest", config=told)[CONFIG][SIGNATURES])  # type: ignore[arg-type, call-overload, index]
            for k, client in enumerate(self.clients)
        }
        for client in self.clients:
            client.ask("query", config=told | {SIGNATURES: write_signatures(signed)})
        network = build(load(EXPERIMENT.data, 0).dataset.task, EXPERIMENT.model, Stream(0))
        self.given = to_numpy(get(network))
        self.layout = Layout.of(self.given)

    def sum(self, members: Sequence[int], attempt: int, before_reveal: Callable[[], None] = lambda: None) -> np.ndarray:
        """The unmasked sum of a round of the members, int64; `before_reveal` is called before shares are asked for."""
        privacy = EXPERIMENT.privacy.protection
        _, threshold = choose_degree(CLIENTS, privacy.drop_outs, privacy.colluders, True)
        size = RESERVED + self.layout.size
        session = Session(RUN, 1, attempt, size, threshold, LEAST, True, self.manifest.digest)
        around = {k: tuple(j for j in members if j != k) for k in members}
        server = SecAggServer(session, list(members), around, self.registry)
        base = {"run": RUN, "server-round": 1, "attempt": attempt}

        def stage(name: str, bring: Callable[[int], dict[str, bytes]], take: Callable[[int, bytes], None]) -> None:
            for k in members:
                take(k, self.clients[k].ask(f"query.{name}", config=base, inbox=bring(k))[CONFIG][BLOB])  # type: ignore[arg-type, call-overload, index]

        stage("advertise", lambda _: {}, server.adverts)
        server.close()
        stage("share", lambda k: {BLOB: server.roster(k)}, server.shares)
        server.close()
        config = {**base, "learning-rate": 0.1, "reference-examples": 1797}
        for k in members:
            reply = self.clients[k].ask("train", self.given, config, inbox={BLOB: server.inbox(k)})
            blob = from_sealed(reply["arrays"], "secagg")  # type: ignore[arg-type]
            assert blob is not None
            server.add(k, read_masked(session, k, blob))
        server.close()
        survivors, bound = server.survivors(), shown(self.given, self.layout, config)
        stage(
            "confirm", lambda _: {BLOB: survivors, "confirmations": b""}, lambda k, blob: server.confirm(k, blob, bound)
        )
        server.close()
        signed = server.confirmations()
        before_reveal()
        stage("reveal", lambda _: {BLOB: survivors, "confirmations": signed}, server.reveals)
        return server.total(bound).view(np.int32).astype(np.int64)


OTHERS = [k for k in range(CLIENTS) if k != VICTIM]


def test_a_client_that_remembers_reveals_no_second_sum(tmp_path: Path) -> None:
    server = LyingServer(tmp_path / "keys")
    server.sum(range(CLIENTS), 0)
    with pytest.raises(Refused) as refused:
        server.sum(OTHERS, 1)
    assert any("was unmasked already" in text for text in refused.value.said)


def forgetful(folder: Path, *, ledger: bool) -> tuple[LyingServer, np.ndarray, np.ndarray]:
    """A server whose clients all crash after they revealed, with the sums that it then has; raise Refused where it has one."""
    server = LyingServer(folder, ledger=ledger)
    kept: list[object] = []
    everybody = server.sum(range(CLIENTS), 0, lambda: kept.extend(copy.deepcopy(c.state) for c in server.clients))
    for client, state in zip(server.clients, kept, strict=True):
        client.state = state  # type: ignore[assignment]
    return server, everybody, server.sum(OTHERS, 1)


def test_a_client_that_crashed_after_its_answer_reveals_no_second_sum(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        forgetful(tmp_path / "keys", ledger=True)


def test_without_its_ledger_it_would(tmp_path: Path) -> None:
    server, everybody, rest = forgetful(tmp_path / "keys", ledger=False)
    examples = len(load(EXPERIMENT.data, 0).client(VICTIM)[0])
    weights = (everybody - rest)[RESERVED:] * make_plan(EXPERIMENT.privacy, CLIENTS).grid.step * 1797 / examples
    start = np.concatenate([value.reshape(-1) for value in server.given.values()])
    assert np.corrcoef(weights, start)[0, 1] > 0.9  # the victim's own weights, near the model that it was sent
