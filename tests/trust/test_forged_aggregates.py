"""A server that makes aggregates up, or adds what it likes: no client decrypts one, and the first ends the run for it.

Without a check of the sum, a client's refusal told one coefficient of the key that all clients share: 6,811 messages to
one client gave the key of BFV, 20,735 that of CKKS. The defence is `privacy/homomorphic/mac.py`.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as sealapi
from flwr.app import MessageType
from helpers.protected import resealed
from trust.liar import DeployedClient, Refused

from fedveil import Experiment
from fedveil.client.learning.homomorphic import HomomorphicClient, Terms
from fedveil.client.learning.replies import REFUSED
from fedveil.client.node.trainer import ClientProfile
from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.core.wire.messages import ARRAYS, MANIFEST, SIGNATURES, from_sealed, to_sealed
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic import lattice
from fedveil.privacy.homomorphic.keys import load_server, write_keys
from fedveil.privacy.homomorphic.lattice import Adder
from fedveil.privacy.homomorphic.mac import Authenticator, Proof, Sender, Tally, count_tags
from fedveil.privacy.homomorphic.seal import Scratch, read_context, trim
from fedveil.privacy.homomorphic.wire import Header, expect, read, write
from fedveil.privacy.plan import make_plan
from fedveil.privacy.trust.key_folders import load_registry, new_parties
from fedveil.privacy.trust.manifest import Manifest, now, write_signatures

CLIENTS, RUN, CREATED = 4, b"R" * 16, now()
SETTINGS = {
    "data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": 3, "model.hidden": [8], "training.epochs": 1,
    "data.validation_fraction": 0.1, "evaluation.federated": True, "engine": "sequential",
}  # fmt: skip


@dataclass
class Liar:
    """A server that holds server.ctx and the settings, and no key; and the deployed clients that it speaks to."""

    protection: str
    folder: Path

    def __post_init__(self) -> None:
        experiment = Experiment.preset("digits").override({**SETTINGS, "privacy.protection": self.protection})
        self.context = load_server(self.folder / "server" / "server.ctx")
        self.plan, self.toml = make_plan(experiment.privacy, CLIENTS), experiment.toml()
        network = build(load(experiment.data, 0).dataset.task, experiment.model, Stream(0))
        self.model = to_numpy(get(network))
        self.layout = Layout.of(self.model)
        registry = load_registry(self.folder / "server")
        assert registry is not None
        self.registry, self._greetings = registry, dict[str, dict[str, bytes]]()
        self.clients = [self.deployed(number) for number in range(CLIENTS)]
        self.reference = 3000  # more than there are: nothing forbids a server to say so

    def deployed(self, number: int, run_id: int = 1, **settings: Any) -> DeployedClient:
        """A client that agreed to the run with all others, and has seen no message of a round."""
        toml = Experiment.parse(self.toml).override(settings).toml()
        client = self.begun(number, toml, run_id)
        client.ask("query", config=self.greeting(toml))
        return client

    def begun(self, number: int, toml: str, run_id: int = 1) -> DeployedClient:
        profile = ClientProfile(number, f"digits:{number + 1}/{CLIENTS}", str(self.folder / f"client-{number + 1}"))
        return DeployedClient(profile, {"experiment": toml}, run_id=run_id)

    def manifest(self, toml: str) -> Manifest:
        return Manifest.of(RUN.hex(), toml, "", self.registry, reproducible=False, created=CREATED)

    def greeting(self, toml: str) -> dict[str, bytes]:
        """The manifest of these settings, which all clients signed."""
        if toml not in self._greetings:
            told = {MANIFEST: self.manifest(toml).content}
            signed = {
                number: self.begun(number, toml).ask("query.manifest", config=told)["config"][SIGNATURES]
                for number in range(CLIENTS)
            }
            self._greetings[toml] = told | {SIGNATURES: write_signatures(signed)}
        return self._greetings[toml]

    def train(self, client: int, number: int, model: Any = None, **config: Any) -> bytes:
        """Ask a client for its update of a round; return the upload."""
        settings = {"server-round": number, "learning-rate": 0.1, "run": RUN, "reference-examples": self.reference}
        settings |= {key.replace("_", "-"): value for key, value in config.items()}
        reply = self.clients[client].ask(
            MessageType.TRAIN, self.record(self.model if model is None else model), settings
        )
        blob = from_sealed(reply[ARRAYS], self.protection)
        assert blob is not None
        return blob

    def record(self, model: Any) -> Any:
        return to_sealed(model, self.protection) if isinstance(model, bytes) else model

    def show(self, client: DeployedClient, blob: bytes, number: int = 1) -> str:
        """Let a client evaluate an aggregate; return its refusal, or nothing."""
        try:
            client.ask(MessageType.EVALUATE, to_sealed(blob, self.protection), {"server-round": number, "run": RUN})
        except Refused as refusal:
            return refusal.reason
        return ""

    def expected(self, upload: bytes) -> Header:
        """What an upload's header says, taken at its word."""
        number, client = struct.unpack_from("<II", upload, 136)
        return expect(
            "upload", self.plan, self.context, run=RUN, round=number, layout=self.layout, client=client,
            reference=struct.unpack_from("<Q", upload, 176)[0], model=upload[184:216], settings=upload[216:248],
        )  # fmt: skip

    def added(self, uploads: Sequence[bytes], senders: Sequence[Sender] | None = None, **changes: Any) -> bytes:
        """Add uploads as a server does; senders: those that the aggregate names; changes: to its header."""
        adder, tally = Adder(self.context, self.plan), Tally(self.context.ring)
        for upload in uploads:
            header, body, proof = read(upload, self.expected(upload))
            adder.add(body, header.form, header.seeded)
            tally.add(proof)
        proof = tally.proof()
        if senders is not None:
            proof = Proof(proof.tags, tuple(senders))
        told = {"clients": len(proof.senders), "examples": sum(sender.examples for sender in proof.senders)}
        header = replace(header, kind="aggregate", client=0, seeded=False, nonce=bytes(16), **{**told, **changes})
        return write(header, adder.total(), proof)

    def sender(self, upload: bytes) -> Sender:
        return read(upload, self.expected(upload))[0].sender

    # --- what the published attacks send

    def probe(self, place: int, sign: int, like: bytes | None = None) -> bytes:
        """An aggregate of nobody: c0 = encode(counts) + b x^place, c1 = a constant, so that use or refusal tells of the key.

        like: a true aggregate, whose tags and senders it bears; else it makes some up
        """
        ring, examples = self.context.ring, 1437
        c0, c1 = self.encoded(examples), np.zeros(ring.degree, np.uint64)
        if ring.scheme == "bfv":
            half = ring.prime // (2 * ring.plain)
            c1[0], offset = half // 2, half - half // 4
            c0[place] = (int(c0[place]) + sign * offset) % ring.prime
        else:
            half_step = self.plan.grid.step * 2.0**self.plan.scale_bits / 2
            c1[:] = int(half_step / 4 / 64)
            c0[place] = (int(c0[place]) + sign * int(half_step)) % ring.prime
        body = trim(np.concatenate([c0, c1]), ring.width).tobytes()
        senders = tuple(Sender(client, examples if client == 0 else 0, bytes(16)) for client in range(3))
        proof = Proof(np.zeros((1, count_tags(ring.prime)), np.uint64), senders)
        header = replace(
            expect("aggregate", self.plan, self.context, run=RUN, round=1, layout=self.layout),
            clients=3, examples=examples, reference=examples,
        )  # fmt: skip
        if like is not None:
            header, _, proof = read(
                like, expect("aggregate", self.plan, self.context, run=RUN, round=1, layout=self.layout)
            )
        return write(header, body, proof)

    def encoded(self, examples: int) -> np.ndarray:
        """The polynomial of a chunk that says 3 clients with so many examples, and weights of 0; for CKKS in NTT form."""
        ring, ckks = self.context.ring, self.protection == "ckks"
        kind = sealapi.SCHEME_TYPE.CKKS if ckks else sealapi.SCHEME_TYPE.BFV
        parameters, plain = sealapi.EncryptionParameters(kind), sealapi.Plaintext()
        Scratch().loaded(parameters.load, read_context(self.context.context)[1][0])
        context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if ckks:
            slots = np.zeros(ring.degree)
            slots[:2] = examples * self.plan.grid.step, 3 * self.plan.grid.step
            sealapi.CKKSEncoder(context).encode(slots.view(complex).tolist(), 2.0**self.plan.scale_bits, plain)
            return np.array([plain.data(index) for index in range(ring.degree)], np.uint64)
        slots = [0] * ring.degree
        slots[0] = examples + (3 << self.plan.lattice.field_bits)
        sealapi.BatchEncoder(context).encode(slots, plain)
        found = np.zeros(ring.degree, np.uint64)
        for index in range(plain.coeff_count()):
            found[index] = (ring.prime * plain.data(index) + ring.plain // 2) // ring.plain % ring.prime
        return found


@pytest.fixture(scope="module", params=["bfv", "ckks"])
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "keys"
    privacy = Experiment().override({"privacy.protection": request.param}).privacy
    write_keys(folder, make_plan(privacy, CLIENTS).lattice, CLIENTS, new_parties(CLIENTS, privacy))
    return request.param, folder


@pytest.fixture
def liar(folder) -> Liar:
    return Liar(*folder)


@pytest.fixture
def sealed_secret(monkeypatch) -> None:
    """Fail where the secret key decrypts anything."""

    def touched(*_: object) -> None:
        raise AssertionError("the secret key was used")

    monkeypatch.setattr(lattice._Compact, "decrypt", touched)


def uploads_of(liar: Liar, number: int = 1, model: Any = None) -> list[bytes]:
    return [liar.train(client, number, model) for client in range(CLIENTS)]


def assert_over(liar: Liar, client: DeployedClient, true: bytes) -> None:
    """Fail unless a client refuses even a true aggregate and training, and its key serves in another run."""
    assert liar.show(client, true) == REFUSED
    reply = client.reply(
        MessageType.TRAIN, liar.model,
        {"server-round": 1, "learning-rate": 0.1, "run": RUN, "reference-examples": liar.reference},
    )  # fmt: skip
    assert reply.error[1] == REFUSED
    assert any("left the run for good" in line for line in reply.said)
    assert liar.show(liar.deployed(client.profile.client, run_id=2), true) == ""


@pytest.mark.parametrize("borrowed", [False, True], ids=["own tags", "tags of a true aggregate"])
def test_the_first_probe_ends_the_run_for_its_client_and_the_secret_key_is_not_used(
    liar, borrowed, monkeypatch
) -> None:
    true = liar.added(uploads_of(liar))
    victim = liar.deployed(0)
    with monkeypatch.context() as patch:
        patch.setattr(lattice._Compact, "decrypt", lambda *_: pytest.fail("the secret key was used"))
        probes = [liar.probe(place, sign, true if borrowed else None) for place in (0, 1, 2) for sign in (1, -1)]
        replies = {liar.show(victim, probe) for probe in probes}
    assert replies == {REFUSED}  # whatever the coefficient
    assert_over(liar, victim, true)


def test_a_node_that_begins_anew_has_not_forgotten_the_forgery(liar, tmp_path) -> None:
    true, kept = liar.added(uploads_of(liar)), str(tmp_path / "client-1.ledger")
    victim = liar.deployed(0)
    victim.profile = replace(victim.profile, ledger=kept)
    assert liar.show(victim, liar.probe(0, 1)) == REFUSED
    again = liar.deployed(0)
    again.profile = victim.profile
    assert liar.show(again, true) == REFUSED
    assert liar.show(liar.deployed(0), true) == ""  # a client without a ledger would forget


def test_the_owner_is_told_why_and_the_server_is_not(liar, sealed_secret) -> None:
    victim = liar.deployed(0)
    reply = victim.reply(
        MessageType.EVALUATE, to_sealed(liar.probe(0, 1), liar.protection), {"server-round": 1, "run": RUN}
    )
    assert reply.error[1] == REFUSED
    assert any("is not the sum of the uploads that it names" in line for line in reply.said), reply.said


def test_the_same_probes_tell_of_the_key_where_nothing_checks_the_sum(folder, monkeypatch) -> None:
    """The attack itself: it is the check that stops it, and no other."""
    if folder[0] != "bfv":
        pytest.skip("a coefficient of CKKS takes some twenty messages")
    monkeypatch.setattr(Authenticator, "check", lambda *_, **__: None)
    liar = Liar(*folder)
    outcomes = [
        tuple(bool(liar.show(liar.deployed(0), liar.probe(place, sign))) for sign in (1, -1)) for place in range(12)
    ]
    assert set(outcomes) <= {(False, False), (True, False), (False, True)}  # 0, 1 and -1
    assert len(set(outcomes)) > 1


@pytest.mark.parametrize(
    ("settings", "number"),
    [({}, 5001), ({}, 4), ({}, 0), ({"evaluation.federated": False}, 1), ({"evaluation.every": 2}, 1)],
    ids=["round 5,001", "after the last", "before the first", "not federated", "not this round"],
)
def test_an_evaluation_that_nobody_asked_for_is_refused_before_any_check(liar, settings, number, monkeypatch) -> None:
    true = liar.added(uploads_of(liar))
    monkeypatch.setattr(HomomorphicClient, "receive", lambda *_: pytest.fail("the aggregate was looked at"))
    victim = liar.deployed(0, **settings)
    config = {"server-round": number, "run": RUN}
    reply = victim.reply(MessageType.EVALUATE, to_sealed(true, liar.protection), config)
    assert reply.error[1] == REFUSED
    assert any("the server asks for" in line for line in reply.said), reply.said


# --- sums of true uploads that are not what they are said to be


def refuses(liar: Liar, blob: bytes, number: int = 1, client: int = 0) -> None:
    """Fail unless a client that trained in the round refuses an aggregate for good, with the one answer for all causes."""
    victim = liar.clients[client]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice._Compact, "decrypt", lambda *_: pytest.fail("the secret key was used"))
        kept = copy.deepcopy(victim.state)
        assert liar.show(victim, blob, number) == REFUSED
        assert any("forged-aggregate" in name for name in victim.state), "the run goes on"
        victim.state = kept


def test_true_sums_of_all_and_of_those_that_did_not_drop_out_are_used(liar) -> None:
    uploads = uploads_of(liar)
    for some in (uploads, uploads[:3], uploads[1:]):
        assert liar.show(liar.deployed(0), liar.added(some)) == ""
    whole = liar.added(uploads)
    assert [liar.show(client, whole) for client in liar.clients] == [""] * CLIENTS
    later = uploads_of(liar, 2, whole)
    second = liar.added(later)
    assert [liar.show(client, second, 2) for client in liar.clients] == [""] * CLIENTS
    assert liar.show(liar.deployed(3), second, 2) == ""  # a client that comes late, or starts anew
    resumed = DeployedClient(liar.clients[0].profile, liar.clients[0].settings, copy.deepcopy(liar.clients[0].state))
    assert liar.show(resumed, second, 2) == ""  # sent again by a server that was killed


def test_one_upload_added_three_times_is_refused(liar) -> None:
    upload = liar.train(0, 1)
    sender = liar.sender(upload)
    for senders in ([sender] * 3, [sender._replace(client=client) for client in range(3)]):
        refuses(liar, liar.added([upload] * 3, senders))


def test_a_client_that_is_named_and_left_out_is_missed(liar) -> None:
    uploads = uploads_of(liar)
    refuses(liar, liar.added(uploads[:3], [liar.sender(upload) for upload in uploads]))
    refuses(liar, liar.added(uploads, [liar.sender(upload) for upload in uploads[:3]]))


def test_an_upload_of_another_round_is_refused(liar) -> None:
    first = uploads_of(liar)
    whole = liar.added(first)
    second = uploads_of(liar, 2, whole)
    terms = read(second[0], liar.expected(second[0]))[0]
    mixed = [*second[:3], first[3]]
    refuses(liar, liar.added(mixed, round=2, model=terms.model, settings=terms.settings), 2)
    refuses(liar, liar.added(first, round=2, model=terms.model, settings=terms.settings), 2)


def test_no_combination_of_two_answers_to_one_question_is_used(liar) -> None:
    uploads = uploads_of(liar)
    again = liar.train(0, 1)
    assert liar.sender(again).nonce != liar.sender(uploads[0]).nonce
    refuses(liar, liar.added([*uploads, again]))
    refuses(liar, liar.added([uploads[0], again, *uploads[1:3]], [liar.sender(upload) for upload in uploads]))
    swapped = [liar.sender(again), *map(liar.sender, uploads[1:])]
    refuses(liar, liar.added(uploads, swapped))


@pytest.mark.parametrize(
    "others",
    [{"reference_examples": 300_000}, {"learning_rate": 1e-12}, {"model": "another"}, {"proximal_mu": 3.0}],
    ids=["reference", "learning rate", "model", "proximal term"],
)
def test_terms_that_make_all_updates_but_one_vanish_are_refused(liar, others) -> None:
    """The victim's update would be all that the aggregate tells of."""
    if "model" in others:
        others = {"model": {name: value + 1 for name, value in liar.model.items()}}
    victim, *rest = liar.train(0, 1), *(liar.train(client, 1, **others) for client in range(1, CLIENTS))
    first, other = liar.expected(victim), liar.expected(rest[0])
    for told in (first, other):
        refuses(liar, liar.added([victim, *rest], reference=told.reference, model=told.model, settings=told.settings))


def test_clients_with_another_model_of_the_round_before_refuse_each_others_aggregate(liar) -> None:
    """Two worlds: the server keeps two models, and shows each client one of them."""
    uploads = uploads_of(liar)
    one, other = liar.added(uploads), liar.added(uploads[:3])
    later = [liar.train(client, 2, other) for client in range(1, CLIENTS)]
    assert liar.show(liar.clients[0], one) == ""
    refuses(liar, liar.added(later), 2)
    assert liar.show(liar.clients[1], liar.added(later), 2) == ""


def test_a_client_that_is_not_registered_is_refused(liar) -> None:
    """The server holds a client's key, which it must not, and still needs a client that there is not."""
    uploads = uploads_of(liar)
    header, manifest = read(uploads[0], liar.expected(uploads[0]))[0], liar.manifest(liar.toml).digest
    side = HomomorphicClient(liar.plan, CLIENTS, liar.layout, liar.folder / "client-1" / "client.key", manifest)
    terms = Terms(1, RUN, liar.reference, header.model, header.settings)
    for client, refused in ((CLIENTS - 1, False), (CLIENTS, True)):
        other = side.seal((liar.model, None), client, 10, terms).blob
        blob = liar.added([*uploads[:3], other])
        if refused:
            refuses(liar, blob)
        else:
            assert liar.show(liar.deployed(0), blob) == ""  # with the key alone it could: colluding clients can forge


# --- changed bits


FIELDS = {  # of the header: the offset of a byte whose change nothing but the tags can tell from an honest aggregate
    "clients": 144, "examples": 168, "reference": 176, "model": 190, "settings": 220,
}  # fmt: skip


def flipped(blob: bytes, place: int) -> bytes:
    """An aggregate with a changed bit and a right checksum."""
    changed = bytearray(blob)
    changed[place] ^= 1
    return resealed(bytes(changed))


def test_a_changed_bit_is_refused_wherever_it_is(liar) -> None:
    true = liar.added(uploads_of(liar))
    ring, end = liar.context.ring, len(true) - 28 * CLIENTS
    tags = range(end - count_tags(ring.prime) * ring.width, end)
    body = [276, 276 + 1000, 276 + ring.degree * ring.width, tags[0] - ring.width]
    for place in [*body, *tags[:: ring.width - 1]]:
        refuses(liar, flipped(true, place))
    for entry in range(end, len(true), 28):
        for place in (entry, entry + 4, entry + 12, entry + 27):
            refuses(liar, flipped(true, place))
    for place in FIELDS.values():
        victim = liar.deployed(0)
        assert liar.show(victim, flipped(true, place)) == REFUSED
    for place in range(0, 272, 4):
        assert liar.show(liar.deployed(1), flipped(true, place)) == REFUSED, place


def test_an_accident_ends_nothing(liar) -> None:
    """A checksum that is wrong, a message that was cut: the same aggregate, sent again whole, is used."""
    true = liar.added(uploads_of(liar))
    client = liar.clients[0]
    for damaged in (true[:-1], true[:300] + b"?" + true[301:], b"", true[:100]):
        assert liar.show(client, damaged) == REFUSED
    assert liar.show(client, true) == ""


def test_a_refused_decryption_has_the_words_of_a_refused_check(liar) -> None:
    """A true sum that does not decrypt, as a client sent rubbish: the server reads nothing off the refusal."""
    true = liar.added(uploads_of(liar))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice.Encryptor, "decrypt", wrong)
        reply = liar.clients[0].reply(
            MessageType.EVALUATE, to_sealed(true, liar.protection), {"server-round": 1, "run": RUN}
        )
    assert reply.error[1] == REFUSED
    assert any("the sum does not decrypt" in line for line in reply.said)


def wrong(*_: object) -> None:
    raise ProtectionError("the sum does not decrypt")
