"""What a server holds, keeps, says and is sent gives no client's update away, and no key; nothing else prints one either."""

from __future__ import annotations

import base64
import logging
import secrets
import stat
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tenseal
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from helpers.searching import Found, Search, files
from helpers.watched import (
    AFTER_ROUND,
    AFTER_TWO,
    AT_END,
    CLIENTS,
    KEY_RUN,
    OWN,
    ROUNDS,
    Clients,
    as_text,
    experiment,
    key_forms,
    secret_key,
    serving,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import run
from fedveil.client.learning.runtime import client_runtime
from fedveil.core.errors import FedveilError
from fedveil.privacy.homomorphic import seal
from fedveil.privacy.homomorphic.keys import CLIENT, load_client, load_server, write_keys
from fedveil.privacy.homomorphic.keys import SERVER as SERVER_FILE
from fedveil.privacy.homomorphic.lattice import Adder, Encryptor
from fedveil.privacy.plan import make_lattice, make_plan
from fedveil.privacy.secagg import streams
from fedveil.privacy.secagg.client import SecAggClient
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.trust.identity import Registry, Signer, load_signer
from fedveil.privacy.trust.key_folders import load_identity, new_parties
from fedveil.simulations.display import Display
from fedveil.simulations.holder import Holder

pytestmark = pytest.mark.slow  # the memory of a server's process is searched


def secrets_found(found: dict[str, list[Found]]) -> dict[str, set[str]]:
    """Which secrets were found where."""
    return {name: {one.secret for one in some} for name, some in found.items()}


NOTHING_BUT_PLANTED = {"memory": {"planted"}, "files": {"planted"}, "messages": set()}


@pytest.mark.parametrize("protection", ["ckks", "bfv"])
def test_a_server_that_adds_ciphertexts_holds_no_update_and_no_key(protection, tmp_path, monkeypatch) -> None:
    looked = set()
    with serving(protection, tmp_path, monkeypatch) as server:
        clients = server.clients
        key = key_forms(load_client(tmp_path / "keys" / "client-1" / CLIENT).secret, 4096)
        for moment in server.moments():
            if moment in (AFTER_TWO, AFTER_ROUND, AT_END):
                search = Search(clients.all_forms() | key | {"planted": server.planted}, clients.first_forms())
                (found,) = server.look(search)
                assert secrets_found(found) == NOTHING_BUT_PLANTED, found
                assert {one.place.split()[1] for one in found["files"]} == {"log", "run/planted"}
                looked.add(moment)
    assert looked == {AFTER_TWO, AFTER_ROUND, AT_END}
    assert len(clients.updates) == CLIENTS * ROUNDS


def test_a_server_of_secure_aggregation_holds_the_mean_and_no_update(tmp_path, monkeypatch) -> None:
    looked, before_last_share = set(), ("reveal", 1, CLIENTS - 2)
    with serving("secagg", tmp_path, monkeypatch, drops=(CLIENTS - 1, 1)) as server:
        clients, models = server.clients, [server.clients.initial]
        for moment in server.moments():
            if moment[0] == "round":
                models.append(clients.mean(moment[1]))
            if moment in (AFTER_TWO, before_last_share, AFTER_ROUND, AT_END):
                given = clients.first_forms() + [model.tobytes() for model in models]
                updates = Search(clients.all_forms() | {"planted": server.planted}, given)
                keys = Search(clients.small_secrets() | {"planted": server.planted}, least=KEY_RUN)
                *hidden, shown = server.look(updates, keys, Search({"mean": models[-1].tobytes()}))
                for found in hidden:
                    assert secrets_found(found) == NOTHING_BUT_PLANTED, found
                assert secrets_found(shown) == {"memory": {"mean"}, "files": {"mean"}, "messages": set()}
                looked.add(moment)
    assert looked == {AFTER_TWO, before_last_share, AFTER_ROUND, AT_END}
    assert "client 3: gone" in server.said()


def test_the_search_finds_what_a_server_without_protection_holds(tmp_path, monkeypatch) -> None:
    mistake = tmp_path / "mistake"
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 60])
    mistake.write_bytes(context.serialize(save_secret_key=True))
    key = key_forms(secret_key(mistake.read_bytes()), 4096)
    with serving("none", tmp_path, monkeypatch, mistake=str(mistake)) as server:
        for moment in server.moments():
            if moment == AFTER_TWO:
                (found,) = server.look(Search(server.clients.all_forms() | key))
                sent = {f"update of client {update.client}, round 2, float32" for update in server.clients.updates[-2:]}
    where = secrets_found(found)
    assert sent <= where["memory"]
    assert sent <= where["messages"]
    # of a context that TenSEAL made public, SEAL still can decrypt
    assert "secret key, SEAL's" in where["memory"]


def as_shown(secret: bytes) -> dict[str, bytes]:
    """A secret in every way in which a text may show it."""
    shown = {"raw": secret, "escaped": repr(secret)[2:-1].encode(), "bytes": str(list(secret)).encode()}
    whole = np.frombuffer(secret[len(secret) % 8 :], np.uint64)  # a key's coefficients are the last of it
    return shown | as_text(secret) | {"numbers": str(whole.tolist()).encode()}


def showing(**hidden: bytes) -> Search:
    """A search of text for half of a key of 32 bytes, or as much of a longer one."""
    forms = {f"{name}, {form}": text for name, secret in hidden.items() for form, text in as_shown(secret).items()}
    return Search(forms, least=24)


def found_in(search: Search, text: str) -> list[Found]:
    """What a search finds in a text."""
    return list(search.inside("text", text.encode(errors="surrogateescape")))


def private_parts(key: bytes) -> bytes:
    """The private number in a PEM file of a P-384 key, 48 bytes."""
    loaded = load_ssh_private_key(key, None)
    assert isinstance(loaded, EllipticCurvePrivateKey)
    return loaded.private_numbers().private_value.to_bytes(48, "big")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """All parties' folders of a run with ckks, with identities as secure aggregation wants them."""
    folder = tmp_path_factory.mktemp("parties") / "keys"
    privacy = experiment("ckks").privacy
    write_keys(folder, make_lattice(privacy), CLIENTS, new_parties(CLIENTS, privacy))
    return folder


def begun(client: int, signer: Signer, registry: Registry) -> SecAggClient:
    """A client that has just begun a secure aggregation of a vector of ten numbers."""
    return SecAggClient.begin(Session(bytes(16), 1, 0, 10, 3, 3, True), client, signer, registry)


def test_what_holds_a_secret_does_not_show_it(keys) -> None:
    protected, mine = experiment("ckks"), keys / "client-1"
    key, plan = load_client(mine / CLIENT), make_plan(protected.privacy, CLIENTS)
    signer, registry = load_identity(mine, 0)
    assert signer is not None
    assert registry is not None
    runtime, masker = client_runtime(protected.toml(), str(keys)), begun(0, signer, registry)
    compact, public = Encryptor(key, plan), Encryptor(key, plan, compact=False)
    side = runtime.homomorphic(0)
    holders = [
        key, compact, compact._cipher, public, public._cipher, side, side._authenticator, runtime, signer, masker, runtime.secagg,
        load_server(keys / "server" / SERVER_FILE), Holder(None, None, side, None), Revealed(),
    ]  # fmt: skip
    search = showing(
        lattice=seal._open(key.secret, 2**22)[0], file=key.secret, identity=private_parts((mine / "identity.key").read_bytes()),
        mask=masker._masking, sealing=masker._sealing, seed=masker._seed, authentication=key.mac,
    )  # fmt: skip
    for holder in holders:
        assert found_in(search, f"{holder!r} {holder} {[holder]}") == [], type(holder)
    for raw in (key.secret[1000:1040], masker._seed):
        for text in (repr(raw), raw.hex(), str(list(raw)), base64.b64encode(raw).decode()):
            assert found_in(search, f"{{'key': {text}}}")


def test_a_refusal_shows_no_secret(keys, tmp_path) -> None:
    mine, plan = keys / "client-1", make_plan(experiment("ckks").privacy, CLIENTS)
    write_keys(tmp_path / "others", plan.lattice, 1)
    key, other = load_client(mine / CLIENT), load_client(tmp_path / "others" / "client-1" / CLIENT)
    encryptor, adder = Encryptor(key, plan), Adder(load_server(keys / "server" / SERVER_FILE), plan)
    for _ in range(3):
        adder.add(encryptor.encrypt(np.arange(10), 5), encryptor.form(10), encryptor.seeded)
    signer, registry = load_identity(mine, 0)
    assert signer is not None
    assert registry is not None
    masker, pem = begun(0, signer, registry), (mine / "identity.key").read_bytes()
    state = masker.save()

    def damaged(content: bytes, at: int) -> Path:
        path = tmp_path / secrets.token_hex(4)
        path.touch(0o600)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        return path

    shared = damaged(key.context, 0)
    shared.chmod(0o644)
    exact = make_plan(experiment("bfv").privacy, CLIENTS)
    refused: list[Callable[[], object]] = [
        lambda: Encryptor(other, plan).decrypt(adder.total(), 10, 15, 3),
        lambda: Encryptor(key, exact),
        lambda: load_server(mine / CLIENT),
        lambda: load_client(shared),
        *(partial(load_client, damaged(key.context, at)) for at in (0, 1)),
        lambda: [load_client(damaged(key.context, at)) for at in range(1000, 1100)],  # until SEAL notices
        lambda: load_signer(damaged(pem, 60)),
        lambda: load_signer(damaged(pem, 3)),
        lambda: SecAggClient.load(damaged(state, 100).read_bytes()),
        lambda: masker.mask(np.zeros(10, np.uint32)),
        lambda: masker.share(b"no roster"),
        lambda: streams.unseal(masker._masking, bytes(32), 1, 0, streams.seal(masker._seed, bytes(32), 1, 0, masker._seed)),
    ]  # fmt: skip
    search = showing(
        mine=seal._open(key.secret, 2**22)[0], other=seal._open(other.secret, 2**22)[0], file=key.context, pem=pem,
        identity=private_parts(pem), mask=masker._masking, sealing=masker._sealing, seed=masker._seed, state=state,
    )  # fmt: skip
    for number, refuse in enumerate(refused):
        with pytest.raises(FedveilError) as refusal:
            refuse()
        chain, error = [], refusal.value
        while error is not None:
            chain.append(error)
            error = error.__cause__ or error.__context__
        shown = "".join(traceback.format_exception(refusal.value)) + "".join(
            f"{error!r} {error.args}" for error in chain
        )
        assert found_in(search, shown) == [], number


@pytest.mark.parametrize("protection", ["ckks", "secagg"])
def test_a_run_prints_and_keeps_no_key_but_in_files_of_its_owner(
    protection, tmp_path, monkeypatch, caplog, capfd
) -> None:
    clients = Clients(experiment(protection), None)
    clients.watch(monkeypatch)
    for name in ("", "flwr", "fedveil"):
        caplog.set_level(logging.DEBUG, name)
    monkeypatch.setattr("fedveil.simulations.run.quiet_flower", nullcontext)
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])
    out = tmp_path / "run"
    run(clients.experiment, out=out, display=Display(None))
    hidden = {f"{name} of {who}": own[name] for who, own in clients.maskers.items() for name in OWN}
    if protection == "ckks":
        (path,) = (out / "keys").rglob(CLIENT)
        key = load_client(path).secret
        hidden |= {"key": seal._open(key, 2**22)[0], "file": key}
        for path in [out / "keys", *(out / "keys").rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    search = showing(**hidden)
    assert found_in(search, caplog.text + "".join(capfd.readouterr())) == []
    kept = {found.place.split()[1] for place, content in files(out) for found in search.inside(place, content)}
    assert kept == ({"keys/client-1/client.key"} if protection == "ckks" else set())

    one = next(iter(hidden.values()))[-40:]  # the same search finds what is shown
    logging.getLogger("flwr").debug("planted: %s", one.hex())
    print("planted:", one)
    assert found_in(search, caplog.text)
    assert found_in(search, "".join(capfd.readouterr()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 120), st.integers(0, 400), st.integers(40, 100), st.booleans())
def test_the_search_finds_what_comparing_every_window_finds(seed, start, at, length, numbers) -> None:
    rng = np.random.default_rng(seed)
    other, data = rng.bytes(200), rng.bytes(500)
    secret = rng.integers(-(2**20), 2**20, 28).tobytes() if numbers else rng.bytes(224)
    piece = secret[start : start + length]
    data = data[:at] + piece + data[at:]
    search = Search({"other": other, "secret": secret})
    with mock.patch("helpers.searching.PIECE", 128):
        found = list(search.inside("data", data))
        windows = [begin for begin in range(len(secret) - 63) if secret[begin : begin + 64] in data]
        assert bool(found) == bool(windows)
        assert {one.secret for one in found} <= {"secret"}
        assert all(secret[one.start : one.start + one.length] in data for one in found)
        assert list(Search({"secret": secret}, [b"known" + piece]).inside("data", data)) == []
