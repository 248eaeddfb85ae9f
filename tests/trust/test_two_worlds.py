"""A server that shows half of a secure aggregation's clients another model, another rate or another cohort than the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trust.liar import DeployedClient, Refused

from fedveil.client.node.trainer import ClientProfile
from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.core.wire.messages import BLOB, CONFIRMATIONS, MANIFEST, SIGNATURES, from_sealed
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.plan import RESERVED
from fedveil.privacy.secagg.graph import choose_degree
from fedveil.privacy.secagg.messages import Kind, Session, pack, unpack
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.secagg.vectors import read_masked, shown
from fedveil.privacy.trust.key_folders import load_registry, new_parties
from fedveil.privacy.trust.manifest import Manifest, now, write_signatures

CLIENTS = 6
EXPERIMENT = Experiment.preset("digits").override(
    {
        "data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": 2, "model.hidden": [8], "model.dropout": 0.0,
        "privacy.protection": "secagg", "engine": "sequential",
    }
)  # fmt: skip
MODEL = to_numpy(get(build(load(EXPERIMENT.data, 0).dataset.task, EXPERIMENT.model, Stream(0))))
LAYOUT = Layout.of(MODEL)
OTHER = {name: value + np.float32(0.01) for name, value in MODEL.items()}
RUN = b"R" * 16
REFERENCE = {"reference-examples": 1500}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(folder, None, CLIENTS, new_parties(CLIENTS, Privacy(protection=ProtectionChoice("secagg"))))
    return folder


class LyingServer:
    """A server that follows the protocol with its clients, but for what it shows each of them."""

    def __init__(self, keys: Path) -> None:
        registry = load_registry(keys / "server")
        assert registry is not None
        self.registry = registry
        toml = EXPERIMENT.toml()
        self.manifest = Manifest.of(RUN.hex(), toml, "", registry, reproducible=False, created=now())
        self.clients = [
            DeployedClient(
                ClientProfile(k, f"digits:{k + 1}/{CLIENTS}", str(keys / f"client-{k + 1}")),
                {"experiment": toml, "words": ""},
            )
            for k in range(CLIENTS)
        ]
        told = {MANIFEST: self.manifest.content}
        signed = {
            k: client.ask("query.manifest", config=told)["config"][SIGNATURES] for k, client in enumerate(self.clients)
        }
        for client in self.clients:
            client.ask("query", config=told | {SIGNATURES: write_signatures(signed)})

    def begin(self, members: Iterable[int], number: int = 1) -> SecAggServer:
        """Begin a session with these members."""
        _, threshold = choose_degree(
            CLIENTS, EXPERIMENT.privacy.protection.drop_outs, EXPERIMENT.privacy.protection.colluders, True
        )
        size, least = RESERVED + LAYOUT.size, EXPERIMENT.privacy.least
        self.session = Session(RUN, number, 0, size, threshold, least, True, self.manifest.digest)
        self.base = {"run": RUN, "server-round": number, "attempt": 0}
        listed = sorted(members)
        around = {k: tuple(j for j in listed if j != k) for k in listed}
        return SecAggServer(self.session, listed, around, self.registry)

    def stage(self, name: str, members: Iterable[int], bring: Callable[[int], Mapping[str, bytes]]) -> dict[int, bytes]:
        """What each member answers in a stage."""
        return {
            k: bytes(self.clients[k].ask(f"query.{name}", config=self.base, inbox=bring(k))["config"][BLOB])
            for k in members
        }

    def masked(self, members: list[int], given: Mapping[int, tuple[Mapping[str, np.ndarray], dict[str, Any]]]) -> Any:
        """Play a round up to the masked vectors; `given`: the model and the settings that each member is shown."""
        server = self.begin(members)
        for k, blob in self.stage("advertise", members, lambda _: {}).items():
            server.adverts(k, blob)
        server.close()
        for k, blob in self.stage("share", members, lambda k: {BLOB: server.roster(k)}).items():
            server.shares(k, blob)
        server.close()
        for k in members:
            model, settings = given[k]
            reply = self.clients[k].ask("train", model, self.base | REFERENCE | settings, inbox={BLOB: server.inbox(k)})
            blob = from_sealed(reply["arrays"], "secagg")
            assert blob is not None
            server.add(k, read_masked(self.session, k, blob))
        server.close()
        return server


RATE = {"learning-rate": 0.1}


def test_an_honest_server_gets_the_sum(keys) -> None:
    server = LyingServer(keys)
    members = list(range(CLIENTS))
    unmasker = server.masked(members, dict.fromkeys(members, (MODEL, RATE)))
    listed = unmasker.survivors()
    bound = shown(MODEL, LAYOUT, server.base | REFERENCE | RATE)
    for k, blob in server.stage("confirm", members, lambda _: {BLOB: listed, CONFIRMATIONS: b""}).items():
        unmasker.confirm(k, blob, bound)
    unmasker.close()
    signed = unmasker.confirmations()
    for k, blob in server.stage("reveal", members, lambda _: {BLOB: listed, CONFIRMATIONS: signed}).items():
        unmasker.reveals(k, blob)
    assert unmasker.total(bound)[1] == CLIENTS


@pytest.mark.parametrize(
    "other", [(OTHER, RATE), (MODEL, {"learning-rate": 0.0}), (MODEL, {**RATE, "proximal-mu": 1.0})],
    ids=["model", "rate", "pull to the model"],
)  # fmt: skip
def test_halves_that_are_shown_different_things_do_not_reveal_and_say_why(keys, other) -> None:
    server = LyingServer(keys)
    members = list(range(CLIENTS))
    given = {k: (MODEL, RATE) if k < CLIENTS // 2 else other for k in members}
    unmasker = server.masked(members, given)
    listed = unmasker.survivors()
    signed = server.stage("confirm", members, lambda _: {BLOB: listed, CONFIRMATIONS: b""})
    all_signed = {k: unpack(Kind.CONFIRMATION, server.session, k, blob)[k] for k, blob in signed.items()}
    confirmations = pack(Kind.CONFIRMATIONS, server.session, 0, all_signed)
    for k in members:
        with pytest.raises(Refused) as error:
            server.clients[k].ask(
                "query.reveal", config=server.base, inbox={BLOB: listed, CONFIRMATIONS: confirmations}
            )
        assert "it was shown another model or other settings of this round" in " ".join(error.value.said)
    bound = shown(MODEL, LAYOUT, server.base | REFERENCE | RATE)
    for k, blob in signed.items():  # nor does an honest server take a signature of something else
        if k < CLIENTS // 2:
            unmasker.confirm(k, blob, bound)
        else:
            with pytest.raises(ProtectionError, match=f"client {k}"):
                unmasker.confirm(k, blob, bound)


def test_a_cohort_that_is_split_in_halves_goes_no_further_than_its_keys(keys) -> None:
    server = LyingServer(keys)
    for members in ([0, 1, 2], [3, 4, 5]):
        server.begin(members)
        adverts = {
            k: unpack(Kind.ADVERT, server.session, k, blob)[k]
            for k, blob in server.stage("advertise", members, lambda _: {}).items()
        }
        for k in members:
            roster = pack(Kind.ROSTER, server.session, k, adverts)
            with pytest.raises(Refused) as error:
                server.clients[k].ask("query.share", config=server.base, inbox={BLOB: roster})
            assert "does not go on" in " ".join(error.value.said)


def test_the_others_cannot_be_told_to_send_nothing_so_that_one_update_is_the_sum(keys) -> None:
    """0.1.0: masks were bound to the model and the message, and not to the settings; the sum was the victim's weights."""
    server = LyingServer(keys)
    emptied = EXPERIMENT.override({"training.max_grad_norm": 1e-30}).toml()
    victim, *others = server.clients
    server.begin(range(CLIENTS))
    assert victim.ask("query.advertise", config=server.base, inbox={})
    for client in others:
        for kind in ("query.advertise", "train"):
            with pytest.raises(Refused) as error:
                client.ask(kind, MODEL, server.base | REFERENCE | RATE, inbox={}, experiment=emptied)
            assert "training.max_grad_norm is None in the manifest and 1e-30 here" in " ".join(error.value.said)
