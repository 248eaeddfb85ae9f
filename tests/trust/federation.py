"""Deployed clients with keys, ledgers and policies, and the server of a secure aggregation that speaks to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trust.liar import DeployedClient

from fedveil.client.node.ledger import source_name
from fedveil.client.node.trainer import ClientProfile
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import BLOB, CONFIG, MANIFEST, REFERENCE, SIGNATURES, from_sealed
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
from fedveil.privacy.trust.ledger import Ledger
from fedveil.privacy.trust.manifest import Manifest, now, write_signatures


def first_model(experiment: Experiment) -> dict[str, np.ndarray]:
    """The model that everybody makes from the seed."""
    return to_numpy(get(build(load(experiment.data, 0).dataset.task, experiment.model, Stream(experiment.seed))))


@dataclass
class Federation:
    """The clients of a federation, each with a folder of keys, a policy and a ledger of its own.

    folder: of all of that; experiment: of its runs; policy: of every client's owner, as TOML
    """

    folder: Path
    experiment: Experiment
    policy: str = ""
    _keyed: set[Path] = field(default_factory=set)

    @property
    def keys(self) -> Path:
        """The folders of keys, made when they are first needed."""
        folder = self.folder / "keys"
        if not folder.exists():
            clients = self.experiment.data.clients
            write_keys(folder, None, clients, new_parties(clients, self.experiment.privacy))
        return folder

    def profile(self, client: int) -> ClientProfile:
        """A client's part in every run."""
        policy = self.folder / "policy.toml"
        policy.write_text(self.policy)
        return ClientProfile(
            client, f"digits:{client + 1}/{self.experiment.data.clients}", str(self.keys / f"client-{client + 1}"), str(policy),
            str(self.ledger_path(client)),
        )  # fmt: skip

    def ledger_path(self, client: int) -> Path:
        """The file of a client's ledger."""
        return self.folder / "ledgers" / f"client-{client + 1}.ledger"

    def ledger(self, client: int) -> Ledger:
        """A client's ledger, as its owner reads it."""
        return Ledger.open(self.ledger_path(client), source_name(self.profile(client).data))

    def begin(
        self, run: bytes | Manifest, members: Iterable[int] | None = None, **run_config: Any
    ) -> dict[int, DeployedClient]:
        """Start a run: clients without any memory of earlier ones but their ledgers, who sign its manifest and greet.

        run: its name, or the manifest of one that goes on
        """
        settings = {"experiment": self.experiment.toml(), "words": "", **run_config}
        clients = {
            k: DeployedClient(self.profile(k), dict(settings))
            for k in (range(self.experiment.data.clients) if members is None else members)
        }
        manifest = run if isinstance(run, Manifest) else Manifest.of(
            run.hex(), self.experiment.toml(), "", load_registry(self.keys / "server") or {},
            reproducible=bool(run_config.get("reproducible")), created=now(),
        )  # fmt: skip
        signed = {
            k: bytes(client.ask("query.manifest", config={MANIFEST: manifest.content})[CONFIG][SIGNATURES])
            for k, client in clients.items()
        }
        for client in clients.values():
            client.ask("query", config={MANIFEST: manifest.content, SIGNATURES: write_signatures(signed)})
        self.manifest = manifest
        return clients

    def aggregate(
        self, clients: Mapping[int, DeployedClient], number: int = 1, attempt: int = 0, *, lost: Iterable[int] = ()
    ) -> np.ndarray:
        """One round of secure aggregation with these clients, to the unmasked sum of their numbers, int64.

        lost: clients whose masked update never arrives
        """
        experiment, run = self.experiment, bytes.fromhex(self.manifest.run)
        given, privacy = first_model(experiment), experiment.privacy
        layout, cohort = Layout.of(given), experiment.federation.cohort
        _, threshold = choose_degree(cohort, privacy.protection.drop_outs, privacy.protection.colluders, True)
        size = RESERVED + layout.size
        session = Session(run, number, attempt, size, threshold, privacy.least, True, self.manifest.digest)
        around = {k: tuple(j for j in clients if j != k) for k in clients}
        server = SecAggServer(session, sorted(clients), around, load_registry(self.keys / "server"))
        base: dict[str, Any] = {"run": run, "server-round": number, "attempt": attempt}

        def stage(name: str, members: Iterable[int], bring: Any) -> dict[int, bytes]:
            return {
                k: bytes(clients[k].ask(f"query.{name}", config=base, inbox=bring(k))[CONFIG][BLOB]) for k in members
            }

        for k, blob in stage("advertise", clients, lambda _: {}).items():
            server.adverts(k, blob)
        server.close()
        for k, blob in stage("share", clients, lambda k: {BLOB: server.roster(k)}).items():
            server.shares(k, blob)
        server.close()
        config = {**base, "learning-rate": 0.1, REFERENCE: experiment.federation.cohort if privacy.noisy else 1797}
        for k, client in clients.items():
            reply = client.ask("train", given, config, inbox={BLOB: server.inbox(k)})
            blob = from_sealed(reply["arrays"], "secagg")  # type: ignore[arg-type]
            if k not in lost:
                server.add(k, read_masked(session, k, blob or b""))
        stay, survivors = list(server.close()), server.survivors()
        for k, blob in stage("confirm", stay, lambda _: {BLOB: survivors, "confirmations": b""}).items():
            server.confirm(k, blob, shown(given, layout, config))
        server.close()
        signed = server.confirmations()
        for k, blob in stage("reveal", stay, lambda _: {BLOB: survivors, "confirmations": signed}).items():
            server.reveals(k, blob)
        return server.total(shown(given, layout, config)).view(np.int32).astype(np.int64)

    def step(self) -> float:
        """The step of the grid that numbers lie on, of weights times examples over the announced ones."""
        return make_plan(self.experiment.privacy, self.experiment.federation.cohort).grid.step
