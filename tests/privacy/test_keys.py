"""Key files: who gets what, who may read it, and what is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
from importlib import import_module
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as sealapi
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

import fedveil
from fedveil.core.errors import FedveilError, ProtectionError, SettingsError
from fedveil.privacy.homomorphic import keys, seal
from fedveil.privacy.homomorphic.parameters import Lattice
from fedveil.privacy.plan import PROFILES

LATTICES = [Lattice(scheme, degree, primes, bits) for scheme, degree, primes, bits in PROFILES.values()]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_both_files_open_in_plain_tenseal_and_only_the_clients_holds_a_secret(lattice):
    client, server = keys.make_keys(lattice)
    assert tenseal.context_from(client).has_secret_key()
    context = tenseal.context_from(server)
    assert not context.has_secret_key()
    assert len(server) < 120
    assert client[-keys.KEY_ID :] == server[-keys.KEY_ID :]


def test_a_server_context_has_no_key_of_any_kind(parties):
    context = tenseal.context_from(parties("ckks").server.context)
    for has in (context.has_secret_key, context.has_galois_keys, context.has_relin_keys):
        assert not has()


def test_every_key_is_another():
    first, second = keys.make_keys(LATTICES[0]), keys.make_keys(LATTICES[0])
    assert first[1][-keys.KEY_ID :] != second[1][-keys.KEY_ID :]
    secrets = [seal.read_context(client)[3] for client, _ in (first, second)]
    assert secrets[0] != secrets[1]


def resigned(before: bytes, key_id: bytes) -> bytes:
    """A file's fields, with the checksum and the id that belong to them."""
    checksum = crc32(key_id, crc32(before)).to_bytes(4, "little")
    return before + seal.write_field(1001, checksum) + seal.write_field(1000, key_id)


def test_clients_have_32_random_bytes_for_authentication_and_the_server_has_not(tmp_path):
    made = [keys.make_keys(LATTICES[0]) for _ in range(2)]
    found = [seal.read_context(client)[1002] for client, _ in made]
    assert found[0] != found[1]
    assert all(len(value) == 32 for values in found for value in values)
    assert [len(values) for values in found] == [1, 1]
    client, server = made[0]
    assert 1002 not in seal.read_context(server)
    assert keys.load_client(private(tmp_path / keys.CLIENT, client)).mac == found[0][0]
    before = server[: server.index(seal.write_field(1000, server[-16:])) - 7]
    leaked = resigned(before + seal.write_field(1002, found[0][0]), server[-16:])
    assert keys.holds_secret(leaked)
    with pytest.raises(ProtectionError, match="holds a secret key, and a server must not have one"):
        keys.load_server(private(tmp_path / keys.SERVER, leaked))


@pytest.mark.parametrize("change", ["a bit", "shorter", "twice"])
def test_a_key_for_authentication_that_was_changed_is_refused(tmp_path, change):
    client, _ = keys.make_keys(LATTICES[0])
    field = seal.write_field(1002, seal.read_context(client)[1002][0])
    before, _, _ = client.partition(field)
    forged = {
        "a bit": client.replace(field, field[:-1] + bytes([field[-1] ^ 1])),
        "shorter": resigned(before + seal.write_field(1002, bytes(31)), client[-16:]),
        "twice": resigned(before + field * 2, client[-16:]),
    }[change]
    with pytest.raises(ProtectionError, match=r"its checksum is wrong|its key for authentication has"):
        keys.load_client(private(tmp_path / keys.CLIENT, forged))


def test_a_folder_for_each_party_that_only_its_owner_can_read(tmp_path):
    folder = tmp_path / "run" / "keys"
    before = os.umask(0)
    try:
        key_id = keys.write_keys(folder, LATTICES[0], 3)
    finally:
        os.umask(before)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["client-1/client.key", "client-2/client.key", "client-3/client.key", "server/server.ctx"]
    assert {mode(path) for path in [folder, *folder.iterdir()]} == {0o700}
    assert {mode(path) for path in folder.rglob("*.*")} == {0o600}
    clients = [keys.load_client(folder / f"client-{number}" / keys.CLIENT) for number in (1, 2, 3)]
    server = keys.load_server(folder / "server" / keys.SERVER)
    assert {client.key_id for client in clients} == {server.key_id} == {key_id}
    assert keys.fingerprint(clients[0].key_id) == keys.fingerprint(server.key_id)
    assert [path.name for path in folder.parent.iterdir()] == ["keys"]


def test_keys_are_never_written_over(tmp_path):
    keys.write_keys(tmp_path / "keys", LATTICES[0], 1)
    before = (tmp_path / "keys/server/server.ctx").read_bytes()
    with pytest.raises(SettingsError, match="not empty"):
        keys.write_keys(tmp_path / "keys", LATTICES[0], 1)
    assert (tmp_path / "keys/server/server.ctx").read_bytes() == before
    (tmp_path / "empty").mkdir()
    keys.write_keys(tmp_path / "empty", LATTICES[0], 1)
    assert mode(tmp_path / "empty") == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="exists already"):
        keys.write_keys(tmp_path / "file", LATTICES[0], 1)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match="No space left"):
        keys.write_keys(tmp_path / "keys", LATTICES[0], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o660, 0o644, 0o610])
def test_a_key_that_others_can_reach_is_refused(parties, tmp_path, bits):
    path = tmp_path / keys.CLIENT
    shutil.copy(parties("ckks").folder / "client-1" / keys.CLIENT, path)
    path.chmod(bits)
    with pytest.raises(ProtectionError, match=f"chmod 600 {path}"):
        keys.load_client(path)
    path.chmod(0o400)
    keys.load_client(path)


def test_each_side_refuses_the_others_file(parties):
    folder = parties("ckks").folder
    with pytest.raises(ProtectionError, match="server must not have one"):
        keys.load_server(folder / "client-1" / keys.CLIENT)
    with pytest.raises(ProtectionError, match="holds no secret key"):
        keys.load_client(folder / "server" / keys.SERVER)


def test_a_private_part_is_refused_before_tenseal_sees_it(parties, tmp_path, monkeypatch):
    server = parties("ckks").server.context
    for hidden in (server + seal.write_field(3, b""), seal.write_field(3, b"\x0a\x01x") + server):
        path = private(tmp_path / keys.SERVER, hidden)
        monkeypatch.setattr(keys.tenseal, "context_from", lambda *_, **__: pytest.fail("TenSEAL saw it"))
        with pytest.raises(ProtectionError, match="secret key"):
            keys.load_server(path)


@pytest.mark.parametrize("kept", ["public", "relin", "galois"])
def test_public_relinearisation_and_galois_keys_are_refused(parties, tmp_path, kept):
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 60])
    context.generate_galois_keys()
    whole = context.serialize(
        save_public_key=kept == "public", save_secret_key=False, save_relin_keys=kept == "relin",
        save_galois_keys=kept == "galois",
    )  # fmt: skip
    path = private(tmp_path / keys.SERVER, whole + seal.write_field(1000, bytes(16)))
    with pytest.raises(ProtectionError, match=r"more than|encryption with the secret key"):
        keys.load_server(path)
    for number in range(1, 12):
        if number in (2, 3):  # flags, scale
            continue
        hidden = parties("ckks").server.context + seal.write_field(2, seal.write_field(number, b"a key"))
        with pytest.raises(ProtectionError, match="FedVeil never makes"):
            keys.load_server(private(path, hidden))


def test_a_key_without_an_id_is_refused(parties, tmp_path):
    key = parties("ckks").client.context
    bare = key[: key.rindex(parties("ckks").client.key_id) - 3]
    assert tenseal.context_from(bare).has_secret_key()
    with pytest.raises(ProtectionError, match="no key id"):
        keys.load_client(private(tmp_path / keys.CLIENT, bare))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000), b"\x0a\x05", bytes(2**22 + 1)], ids=len)
@pytest.mark.parametrize("load", [keys.load_client, keys.load_server])
def test_what_is_no_key_is_refused(tmp_path, content, load):
    with pytest.raises(ProtectionError, match="not a key file"):
        load(private(tmp_path / "file", content))


@pytest.mark.parametrize("load", [keys.load_client, keys.load_server])
def test_a_missing_key_is_named(tmp_path, load):
    with pytest.raises(ProtectionError, match=r"nowhere.*cannot be read"):
        load(tmp_path / "nowhere")


@parses("keys.load_client, keys.load_server, damaged files", usual=300)
@given(st.data())
def test_damaged_keys_are_refused_or_read_and_nothing_else(parties, tmp_path_factory, data):
    p = parties(data.draw(st.sampled_from(["ckks", "bfv"])))
    path = tmp_path_factory.getbasetemp() / "damaged"
    server = data.draw(st.booleans())
    content = bytearray(p.server.context if server else p.client.context)
    front = st.integers(0, min(len(content), 250) - 1)
    for place in data.draw(st.lists(st.one_of(front, st.integers(0, len(content) - 1)), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    private(path, bytes(content[:cut]))
    for load, mine in ((keys.load_server, server), (keys.load_client, not server)):
        if not mine:
            with pytest.raises(ProtectionError, match=str(path)):
                load(path)
            continue
        with contextlib.suppress(ProtectionError):
            load(path)


@parses("keys.load_client", "keys.load_server", usual=1000)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_key(tmp_path_factory, data):
    path = private(tmp_path_factory.getbasetemp() / "random", data)
    for load in (keys.load_server, keys.load_client):
        with pytest.raises(ProtectionError):
            load(path)


def test_nothing_that_is_shown_holds_the_secret(parties):
    key = parties("ckks").client
    for shown in (repr(key), str(key)):
        assert "secret" not in shown
        assert "context" not in shown
        assert len(shown) < 300


def test_fingerprints_are_short_and_differ(parties):
    first, second = (parties("ckks", number).client.key_id for number in (0, 1))
    assert keys.fingerprint(bytes.fromhex("3f2a91bc07d455e1") + bytes(8)) == "3f2a-91bc-07d4-55e1"
    assert keys.fingerprint(first) != keys.fingerprint(second)


def test_a_client_finds_its_key(tmp_path):
    with pytest.raises(ProtectionError, match=r"client-3/client.key.*fedveil keys new"):
        keys.find_client_key(tmp_path, 2)
    for place in ("client-1", "client-3", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / keys.CLIENT).write_bytes(b"")
        assert keys.find_client_key(tmp_path, 2) == tmp_path / place / keys.CLIENT


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            Lattice("bfv", 4096, (40, 60), 45),
            "privacy.protection: the key was made for bfv, and the settings want ckks",
        ),
        (
            Lattice("ckks", 8192, (40, 60)),
            "privacy.protection.degree: the key was made for 8192, and the settings want 4096",
        ),
        (Lattice("ckks", 4096, (40, 50)), r"privacy.protection.primes: the key was made for \[40, 50\]"),
        (
            Lattice("bfv", 4096, (40, 60), 20),
            "privacy.protection.plain_bits: the key was made for 20, and the settings want 30",
        ),
    ],
)
def test_a_key_for_other_settings_is_refused_by_name(other, named):
    wanted = Lattice("bfv", 4096, (40, 60), 30) if "plain_bits" in named else LATTICES[0]
    keys.check_lattice(wanted, wanted)
    with pytest.raises(SettingsError, match=named):
        keys.check_lattice(other, wanted)


@pytest.mark.parametrize("degree", [1024, 2048, 4096, 8192, 16384])
def test_the_plain_modulus_is_the_one_that_seal_chooses(degree):
    for bits in range(20, 60):
        assert keys.plain_modulus(bits, degree) == sealapi.PlainModulus.Batching(degree, bits).value()


def test_parameters_that_seal_lacks_are_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(FedveilError, match=r"privacy.protection.primes = \[60, 60\]"):
        keys.write_keys(tmp_path / "keys", Lattice("ckks", 2048, (60, 60)), 1)
    assert list(tmp_path.iterdir()) == []


def test_no_context_is_ever_made_public_in_memory():
    """TenSEAL keeps a working decryptor then: he who holds the object still decrypts."""
    rooms = ["core", "models", "datasets", "privacy", "client", "server", "simulations"]
    folders = [Path(fedveil.__file__).parent, *(Path(import_module(f"fedveil.{room}").__path__[0]) for room in rooms)]
    sources = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    assert Path(keys.__file__).resolve() in sources
    assert [path for path in sources if "make_context" + "_public" in path.read_text()] == []


def test_a_changed_bit_of_a_key_file_is_noticed(tmp_path) -> None:
    """SEAL takes most of them for another key, under the same id."""
    keys.write_keys(tmp_path / "keys", LATTICES[0], 1)
    path = tmp_path / "keys" / "client-1" / keys.CLIENT
    content = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 40):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        with pytest.raises(ProtectionError):
            keys.load_client(path)
    path.write_bytes(content)
    keys.load_client(path)
