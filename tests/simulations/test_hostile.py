"""Bad and hostile input on the way between clients and server: refused by name, and the round goes on where that is safe.

Every message travels as Flower's bytes; the ciphertexts are TenSEAL's. A model is right where it equals the sum of the
updates that count, in whole numbers, by hand.
"""

from __future__ import annotations

import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from helpers.protected import (
    HELD_OUT,
    Observed,
    Outward,
    Sent,
    assert_goes_on,
    assert_same,
    assert_sums,
    blob_of,
    ended,
    forged,
    observe,
    resealed,
    small,
    travelled,
    with_blob,
    with_metric,
)

from fedveil import Experiment
from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record
from fedveil.core.wire.messages import ARRAYS, CONFIG, METRICS, to_arrays, to_sealed
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import load_server, write_keys
from fedveil.privacy.homomorphic.lattice import Adder
from fedveil.privacy.homomorphic.mac import Tally
from fedveil.privacy.homomorphic.wire import expect, read, write
from fedveil.privacy.plan import make_lattice, make_plan
from fedveil.server.checkpoint import load_state

LATTICES = ("bfv", "ckks")
PROTECTIONS = (*LATTICES, "secagg")
Change = Callable[["Liar", Message], Sequence[Message]]


# --- one client's reply is bad


class Liar:
    """From the second round on changes the fourth update that arrives, each time in another way.

    clients: who was made to lie, by round; kept: updates as they were made, by round and client
    """

    def __init__(self, protection: str, changes: Sequence[Change]) -> None:
        self.protection, self._changes = protection, changes
        self.clients: dict[int, int] = {}
        self.kept: dict[tuple[int, int], bytes] = {}

    def __call__(self, sent: Sent, reply: Message) -> Sequence[Message]:
        if sent.stage != "train":
            return [reply]
        self.round, self.client = sent.round, sent.client
        self.kept[sent.round, sent.client] = blob_of(reply)
        if sent.round == 1 or sum(number == sent.round for number, _ in self.kept) != 4:
            return [reply]
        self.clients[sent.round] = sent.client
        return self._changes[sent.round - 2](self, reply)


def blob(change: Callable[[bytes], bytes]) -> Change:
    """The bytes of the update are others."""
    return lambda liar, reply: [with_blob(reply, change(blob_of(reply)), liar.protection)]


def metrics(**values: Any) -> Change:
    """The numbers beside the update are others."""
    return lambda _liar, reply: [with_metric(reply, **values)]


def flipped(update: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(update) // 2
    return update[:middle] + bytes([update[middle] ^ 1]) + update[middle + 1 :]


def replayed(liar: Liar, reply: Message) -> Sequence[Message]:
    """The client's own update of the round before."""
    return [with_blob(reply, liar.kept[liar.round - 1, liar.client], liar.protection)]


def stolen(liar: Liar, reply: Message) -> Sequence[Message]:
    """What another client sent in this round."""
    theirs = next(update for (number, _), update in liar.kept.items() if number == liar.round)
    return [with_blob(reply, theirs, liar.protection)]


def unprotected(_: Liar, reply: Message) -> Sequence[Message]:
    """Weights as they are."""
    reply.content[ARRAYS] = to_arrays({"output.bias": np.ones(10, np.float32)})
    return [reply]


def of_another_protection(liar: Liar, reply: Message) -> Sequence[Message]:
    """An update that says that it is made in another way."""
    return [with_blob(reply, blob_of(reply), "none")]


def of_another_kind(_: Liar, reply: Message) -> Sequence[Message]:
    """Settings where arrays belong."""
    del reply.content[ARRAYS]
    reply.content[ARRAYS] = ConfigRecord({"sealed": b"weights"})
    return [reply]


def without(key: str) -> Change:
    """A record is missing."""

    def change(_: Liar, reply: Message) -> Sequence[Message]:
        del reply.content[key]
        return [reply]

    return change


def no_reply(_: Liar, reply: Message) -> Sequence[Message]:
    """The client is gone."""
    return []


def an_error(_: Liar, reply: Message) -> Sequence[Message]:
    """The client's process broke down."""
    answered = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory"), reply_to=reply)
    return [answered]


ANYWHERE: dict[str, tuple[Change, str]] = {
    "empty": (blob(lambda _: b""), r"of 0 bytes|has 0 bytes"),
    "cut by a byte": (
        blob(lambda update: update[:-1]),
        r"it was cut or joined|masked update has .* bytes, and .* take",
    ),
    "cut in half": (blob(lambda update: update[: len(update) // 2]), r"it was cut or joined|masked update has"),
    "cut to ten bytes": (blob(lambda update: update[:10]), r"of 10 bytes|has 10 bytes"),
    "too long": (blob(lambda update: update + b"\0"), r"it was cut or joined|masked update has"),
    "a bit flipped": (blob(flipped), r"checksum"),
    "random bytes": (blob(lambda update: bytes(range(256)) * 64), r"does not start as one|masked update has"),
    "replayed": (replayed, r"with round \d+, where round \d+ was expected|of another run, round or attempt"),
    "another client's": (stolen, r"with client \d, where client \d was expected|masked update is client \d's"),
    "unprotected": (unprotected, r"its update is not protected with"),
    "of another protection": (of_another_protection, r"its update is not protected with"),
    "settings for arrays": (of_another_kind, r"its update is not protected with"),
    "no arrays": (without(ARRAYS), r"its update is not protected with"),
    "no metrics": (without(METRICS), r"its reply has no number 'seconds'"),
    "no examples": (metrics(num_examples=0), r"num-examples = 0, where a whole number from 1 belongs"),
    "negative examples": (metrics(num_examples=-5), r"num-examples = -5, where a whole number from 1 belongs"),
    "half an example": (metrics(num_examples=0.5), r"num-examples = 0.5, where"),
    "examples that are no number": (metrics(num_examples=float("nan")), r"num-examples = nan, where"),
    "too many examples": (metrics(num_examples=10**6), r"it says 1,000,000 examples, and \d+ were announced for it"),
    "one example more": (metrics(num_examples=289), r"it says 289 examples, and 28\d were announced for it"),
    "a loss that is no number": (metrics(train_loss=float("nan")), r"train-loss = nan: its training failed"),
    "seconds that are no number": (metrics(seal_seconds=float("inf")), r"seal-seconds = inf: its training failed"),
    "clipped less than nothing": (metrics(clipped=-1), r"clipped = -1, where a whole number from 0 belongs"),
    "another name": (metrics(client=77), r"it calls itself client 77"),
    "no reply": (no_reply, r"no answer in time"),
    "an error": (an_error, r"out of memory"),
}
# offsets of fields as privacy/homomorphic/wire.py lays them out
OF_LATTICES: dict[str, tuple[Change, str]] = {
    "of another protocol": (blob(lambda update: b"XXXX" + update[4:]), r"does not start as one"),
    "of another format": (blob(lambda update: forged(update, 4, "H", 9)), r"in format 9, and this FedVeil reads 2"),
    "an aggregate": (blob(lambda update: forged(update, 6, "B", 1)), r"an encrypted aggregate, where an encrypted upload"),
    "of another SEAL": (blob(lambda update: forged(update, 9, "B", 3)), r"with SEAL's version 3\.\d, where SEAL's version 4"),
    "of another degree": (blob(lambda update: forged(update, 12, "I", 8192)), r"with degree 8192, where degree 4096"),
    "of another prime": (blob(lambda update: forged(update, 16, "Q", 2**40 - 87)), r"with data prime 1099511627689, where"),
    "of another grid": (blob(lambda update: forged(update, 42, "h", 9)), r"with grid, in bits, 9, where"),
    "of another range": (blob(lambda update: forged(update, 48, "d", 60.0)), r"with privacy.protection.range 60.0, where privacy.protection.range 6.0"),
    "with another key's id": (blob(lambda update: forged(update, 56, "Q", 0)), r"with key 0000-0000-0000-0000, where key"),
    "of another run": (blob(lambda update: forged(update, 72, "Q", 0)), r"with run 0000-0000-0000-0000, where run"),
    "of another network": (blob(lambda update: forged(update, 88, "Q", 0)), r"with layout of tensors 0000"),
    "of two clients": (blob(lambda update: forged(update, 144, "I", 2)), r"with number of clients 2, where number of clients 1"),
    "with fewer chunks": (blob(lambda update: forged(update, 152, "I", 2)), r"whose header contradicts itself"),
    "of no examples": (blob(lambda update: forged(update, 168, "Q", 0)), r"0 examples in an encrypted upload"),
    "of too many examples": (blob(lambda update: forged(update, 168, "Q", 2**63)), r"examples in an encrypted upload"),
    "of other examples": (blob(lambda update: forged(update, 168, "Q", 7)), r"it says 28\d examples, and its update 7"),
    "no ciphertext": (blob(lambda update: resealed(update[:340] + b"\xff" * 1000 + update[1340:])), r"chunk 0 is no ciphertext"),
}  # fmt: skip


CASES = {kind: ANYWHERE | (OF_LATTICES if kind in LATTICES else {}) for kind in PROTECTIONS}
NAMES = [(kind, name) for kind, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def lied_to(tmp_path_factory) -> Callable[[str], tuple[Observed, Liar]]:
    """A run of a protection in which each round after the first has one bad update, in the order of CASES."""

    @cache
    def play(protection: str) -> tuple[Observed, Liar]:
        changes = [change for change, _ in CASES[protection].values()]
        liar = Liar(protection, changes)
        experiment = small(protection, federation__rounds=1 + len(changes))
        with pytest.MonkeyPatch.context() as patch:
            return observe(patch, experiment, tmp_path_factory.mktemp("lied") / "run", home=liar), liar

    return play


@pytest.mark.parametrize(("protection", "name"), NAMES)
def test_a_bad_update_is_refused_by_name_and_the_others_add_up_exactly(protection, name, lied_to) -> None:
    seen, liar = lied_to(protection)
    ended(seen)
    number = 2 + list(CASES[protection]).index(name)
    client, said = liar.clients[number], CASES[protection][name][1]
    (failure,) = [failure for failure in seen.failures if failure.startswith(f"{number} train ")]
    assert failure.startswith(f"{number} train {client}: ")
    assert re.search(said, failure), failure
    assert f"round {number}: client {client}: {failure.partition(': ')[2]}" in seen.warnings
    row = seen.table("metrics").loc[number]
    assert (row["round"], row.clients, row.failures) == (number, 4, 1)
    assert_sums(seen, small(protection), number, {0, 1, 2, 3, 4} - {client})


def without_last_chunk(update: bytes) -> bytes:
    """An upload without its last chunk, whose header and checksum agree with what is left."""
    chunks, length = struct.unpack_from("<I", update, 152)[0], struct.unpack_from("<I", update, 156)[0]
    end, width = 276 + chunks * length, (struct.unpack_from("<Q", update, 16)[0].bit_length() + 7) // 8
    tags = update[end : len(update) - update[11] * width]
    left = forged(update[: end - length] + tags, 152, "I", chunks - 1)
    return forged(left, 264, "Q", len(left) - 276)


@pytest.mark.parametrize("protection", LATTICES)
def test_an_update_without_its_last_chunk_is_refused(protection, watched) -> None:
    experiment = small(protection, model__hidden=[128])  # more than one chunk
    seen = ended(watched(experiment, home=(liar := Liar(protection, [blob(without_last_chunk)]))))
    (failure,) = seen.failures
    assert failure.startswith(
        f"2 train {liar.clients[2]}: an encrypted message whose header contradicts itself: 9,610 "
    )
    assert_sums(seen, experiment, 2, {0, 1, 2, 3, 4} - {liar.clients[2]})


@pytest.mark.parametrize("protection", [*PROTECTIONS, "none"])
def test_of_a_reply_that_comes_twice_the_first_counts(protection, watched, honest) -> None:
    def twice(sent: Sent, reply: Message) -> Sequence[Message]:
        return [reply, travelled(reply)] if sent.stage == "train" and sent.client == 2 else [reply]

    experiment = small(protection)
    seen = ended(watched(experiment, home=twice))
    assert seen.warnings == [f"round {n}: client 2: a second reply to one message; the first counts" for n in (1, 2)]
    assert seen.table("metrics")[["clients", "failures"]].to_numpy()[1:].tolist() == [[5, 1], [5, 1]]
    for model, wanted in zip(seen.models, honest(experiment).models, strict=True):
        assert_same(model, wanted)


@pytest.mark.parametrize("protection", LATTICES)
def test_a_client_with_another_key_is_left_out_by_the_server_and_then_refuses_the_model(
    protection, watched, tmp_path
) -> None:
    experiment = small(protection)
    write_keys(tmp_path / "others", make_lattice(experiment.privacy), 1)

    def bring(sent: Sent, message: Message) -> Message:
        own = tmp_path / "run" / "keys" / f"client-{sent.client + 1}"
        if sent.client == 3 and not own.exists():
            shutil.copytree(tmp_path / "others" / "client-1", own)
        return message

    seen = ended(watched(experiment, out=bring))
    first, second = seen.failures
    assert re.match(r"1 train 3: an encrypted upload with key \w{4}-.*, where key \w{4}-.* was expected", first)
    assert re.match(r"2 train 3: an encrypted aggregate with key \w{4}-.*, where key \w{4}-.* was expected", second)
    for number in (1, 2):
        assert_sums(seen, experiment, number, {0, 1, 2, 4})


@pytest.fixture
def spoiled_network(monkeypatch) -> Callable[[Experiment], None]:
    """Make `spoiled:factory` a network that gives no numbers for one client's first example."""

    def spoil(experiment: Experiment) -> None:
        module = ModuleType("spoiled")
        monkeypatch.setitem(sys.modules, "spoiled", module)
        mark = torch.as_tensor(load(experiment.data, experiment.seed).client(2)[0].features[0]).reshape(-1)

        class Spoiled(torch.nn.Sequential):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                own = (x.flatten(1) == mark).all(1, keepdim=True)
                return super().forward(x) * torch.where(own, torch.nan, 1.0)

        module.factory = lambda _task, _settings: Spoiled(torch.nn.Flatten(), torch.nn.Linear(64, 10))  # type: ignore[attr-defined]

    return spoil


@pytest.mark.parametrize(
    ("protection", "engine"),
    [*((kind, "sequential") for kind in PROTECTIONS), ("bfv", "processes"), ("secagg", "batched")],
)
def test_weights_that_are_not_finite_are_refused_by_their_client_that_names_the_tensor(
    protection, engine, watched, spoiled_network
) -> None:
    experiment = small(protection, engine=engine, federation__rounds=1)
    spoiled_network(experiment)
    experiment = experiment.override({"model.name": "spoiled:factory"})
    seen = ended(watched(experiment))
    (failure,) = seen.failures
    assert re.match(r"1 train 2: 1\.(weight|bias) holds a number that is not finite \(nan\)$", failure), failure
    assert_sums(seen, experiment, 1, {0, 1, 3, 4})


# --- what spoils a whole round ends in one error, and the run goes on from the last whole round


def damaged_with_a_right_checksum(update: bytes) -> bytes:
    """A ciphertext of nothing that anybody encrypted."""
    return resealed(update[:300] + bytes([update[300] ^ 1]) + update[301:])


def lighter(liar: Liar, reply: Message) -> Sequence[Message]:
    """One example fewer than the update is encrypted with, in the header and beside it."""
    update = blob_of(reply)
    examples = struct.unpack_from("<Q", update, 168)[0] - 1
    return [with_metric(with_blob(reply, forged(update, 168, "Q", examples), liar.protection), num_examples=examples)]


def lighter_than_masked(_: Liar, reply: Message) -> Sequence[Message]:
    """One example fewer than the masked update holds."""
    return [with_metric(reply, num_examples=reply.content[METRICS]["num-examples"] - 1)]


@pytest.mark.parametrize(
    ("protection", "change", "said"),
    [
        *(
            (
                kind,
                blob(damaged_with_a_right_checksum),
                "round 2: an aggregate that is not the sum of the uploads that it names",
            )
            for kind in LATTICES
        ),
        *(
            (kind, lighter, "round 2: an aggregate that is not the sum of the uploads that it names")
            for kind in LATTICES
        ),
        ("secagg", lighter_than_masked, "round 2: the unmasked sum is not of 5 clients with 1,43"),
    ],
)
def test_a_lie_that_only_the_sum_shows_ends_the_round_with_one_error_and_nothing_of_it_is_kept(
    protection, change, said, watched, honest
) -> None:
    experiment = small(protection)
    seen = watched(experiment, home=Liar(protection, [change]))
    assert isinstance(seen.error, ProtectionError)
    assert said in str(seen.error)
    assert f"kept: the model and metrics of rounds up to 1, in {seen.folder}" in str(seen.error)
    assert_goes_on(seen, experiment, watched, honest(experiment))


# --- a server that sends clients what they must not use


def to_clients(stage: str, number: int, clients: Iterable[int], change: Callable[[bytes], bytes | None]) -> Outward:
    """Some clients get another model in a stage of a round; None: weights in the clear."""
    chosen = set(clients)

    def out(sent: Sent, message: Message) -> Message:
        if (sent.stage, sent.round) != (stage, number) or sent.client not in chosen:
            return message
        model = change(blob_of(message))
        content = {**message.content}
        content[ARRAYS] = to_arrays(first_weights()) if model is None else to_sealed(model, "bfv")
        return Message(RecordDict(content), dst_node_id=sent.client + 1, message_type=stage)

    return out


def first_weights() -> dict[str, np.ndarray]:
    experiment = small("bfv")
    network = build(load(experiment.data, experiment.seed).dataset.task, experiment.model, Stream(experiment.seed))
    return to_numpy(get(network))


def added(folder: Path, uploads: Sequence[bytes], number: int, told: int | None = None) -> bytes:
    """A true aggregate of some uploads of a round, made as the server makes it; `told`: how many clients it says it has."""
    experiment = small("bfv", **HELD_OUT)
    plan, context = make_plan(experiment.privacy, 5), load_server(folder / "keys" / "server" / "server.ctx")
    adder, tally, examples = Adder(context, plan), Tally(context.ring), 0
    state, _ = load_state(Record(folder))
    expected = expect(
        "upload", plan, context, run=bytes.fromhex(state.run), round=number, layout=Layout.of(first_weights())
    )
    for upload in uploads:
        client, reference = struct.unpack_from("<I", upload, 140)[0], struct.unpack_from("<Q", upload, 176)[0]
        expected = replace(expected, client=client, reference=reference)
        model, settings = upload[184:216], upload[216:248]
        header, body, proof = read(upload, replace(expected, model=model, settings=settings))
        adder.add(body, header.form, header.seeded)
        tally.add(proof)
        examples += header.examples
    header = replace(
        header,
        kind="aggregate",
        client=0,
        seeded=False,
        clients=told or len(uploads),
        examples=examples,
        nonce=bytes(16),
    )
    return write(header, adder.total(), tally.proof())


REFUSED = {
    "told of two clients": (lambda model: forged(model, 144, "I", 2), "an encrypted message whose header contradicts itself"),
    "of another round": (lambda model: forged(model, 136, "I", 7), "with round 7, where round 2 was expected"),
    "of another run": (lambda model: forged(model, 72, "Q", 1), "with run 0100-0000-0000-0000, where run"),
    "an upload": (lambda model: forged(model, 6, "B", 0), "an encrypted upload, where an encrypted aggregate was expected"),
    "told of other examples": (lambda model: forged(model, 168, "Q", 900), r"an aggregate of 5 clients with 900 examples that names 5 clients with 1,1"),
    "a bit flipped": (flipped, "whose checksum is wrong"),
    "empty": (lambda _: b"", "an encrypted message of 0 bytes"),
    "in the clear": (lambda _: None, "the model of round 2 came without bfv; only the first one may"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "shown"), [("sequential", [1, 4]), ("batched", range(5))], ids=["sequential", "batched"]
)
@pytest.mark.parametrize("name", REFUSED)
def test_clients_refuse_to_score_a_model_that_is_not_the_rounds(name, engine, shown, watched) -> None:
    change, said = REFUSED[name]
    seen = ended(watched(small("bfv", engine=engine, **HELD_OUT), out=to_clients("evaluate", 2, shown, change)))
    assert [failure.partition(": ")[0] for failure in seen.failures] == [f"2 evaluate {client}" for client in shown]
    assert all(said in failure for failure in seen.failures), seen.failures
    why = seen.failures[0].partition(": ")[2]
    assert seen.warnings == [f"round 2: client {client}, evaluate: {why}" for client in shown]
    clients = seen.table("clients")
    scored = clients[(clients["round"] == 2) & (clients.stage == "evaluate")]
    assert sorted(scored.client) == sorted(set(range(5)) - set(shown))


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_clients_refuse_a_second_aggregate_of_a_round(engine, watched, tmp_path, honest) -> None:
    experiment = small("bfv", engine=engine, **HELD_OUT)
    uploads: list[bytes] = []

    def keep(sent: Sent, reply: Message) -> Sequence[Message]:
        if (sent.stage, sent.round) == ("train", 1):
            uploads.append(blob_of(reply))
        return [reply]

    # a true one of three clients: the difference of both would show the other two
    second = to_clients("train", 2, range(5), lambda _: added(tmp_path / "run", uploads[:3], 1))
    seen = watched(experiment, home=keep, out=second)
    assert isinstance(seen.error, ProtectionError)
    said = str(seen.error)
    assert said.startswith("round 2: 0 clients sent an update that could be used")
    assert "client 0: the server sent a second aggregate of round 1, or an old one (the newest is of round 1)" in said
    assert_goes_on(seen, experiment, watched, honest(experiment))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, r"an aggregate of 2 clients is not used: privacy\.protection\.min_clients = 3"),
        (3, "an encrypted message whose header contradicts itself"),
    ],
    ids=["as what it is", "as one of three"],
)
def test_a_sum_of_two_is_not_used(told, said, watched, tmp_path) -> None:
    uploads: list[bytes] = []

    def keep(sent: Sent, reply: Message) -> Sequence[Message]:
        if (sent.stage, sent.round) == ("train", 1):
            uploads.append(blob_of(reply))
        return [reply]

    experiment = small("bfv", **HELD_OUT)
    pair = to_clients("evaluate", 1, [2], lambda _: added(tmp_path / "run", uploads[:2], 1, told))
    seen = ended(watched(experiment, home=keep, out=pair))
    assert re.match(f"1 evaluate 2: {said}", seen.failures[0]), seen.failures


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_clients_do_not_begin_again_with_a_model_in_the_clear(engine, watched) -> None:
    """A server that says a third round is the first, with a model of its choice, would see what each makes of it."""

    def again(sent: Sent, message: Message) -> Message:
        if (sent.stage, sent.round) != ("train", 2):
            return message
        changed = to_clients("train", 2, range(5), lambda _: None)(sent, message)
        changed.content[CONFIG] = ConfigRecord({**changed.content[CONFIG], "server-round": 1})
        return changed

    seen = watched(small("bfv", engine=engine, **HELD_OUT), out=again)
    assert isinstance(seen.error, ProtectionError)
    assert "only the first one may, which everybody makes from the seed, and the newest is of round 1" in str(
        seen.error
    )


# --- clients' counts


@pytest.mark.parametrize("protection", ["none", "bfv", "secagg"])
def test_counts_that_cannot_be_are_left_out_of_the_scores(protection, watched, honest) -> None:
    lies = {1: {"num_examples": 0}, 3: {"correct": -4}, 4: {"false_negatives": 0.5}}

    def lie(sent: Sent, reply: Message) -> Sequence[Message]:
        return (
            [with_metric(reply, **lies[sent.client])] if sent.stage == "evaluate" and sent.client in lies else [reply]
        )

    seen = ended(watched(small(protection, **HELD_OUT), home=lie))
    assert [failure[:13] for failure in seen.failures] == [f"{n} evaluate {k}:" for n in (1, 2) for k in (1, 3, 4)]
    clients = honest(small(protection, **HELD_OUT)).table("clients")
    scored = clients[(clients["round"] == 2) & (clients.stage == "evaluate") & clients.client.isin([0, 2])]
    right = (scored.validation_accuracy * scored.examples).sum() / scored.examples.sum()
    assert seen.result is not None
    assert seen.result.summary["validation_accuracy"] == pytest.approx(right, rel=1e-12)
