"""The folders of the parties: who holds what, what each refuses to start with, and the commands that make and show them."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tenseal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from typer.testing import CliRunner

from fedveil.cli import app
from fedveil.core.errors import FedveilError, ProtectionError, SettingsError
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic import keys
from fedveil.privacy.homomorphic.parameters import Lattice
from fedveil.privacy.plan import PROFILES
from fedveil.privacy.trust import certificates
from fedveil.privacy.trust.identity import load_node_key, new_identity, verify
from fedveil.privacy.trust.key_folders import (
    check_agreed,
    check_client_folder,
    check_server_folder,
    describe,
    load_identity,
    new_parties,
    renew_certificate,
)

COMMON = {"registry.json", "privacy.toml"}
PLAIN = Privacy(protection="none")
LONG_AGO = datetime.now(UTC) - timedelta(days=400)
CLIENTS = 3


def fedveil(*words: object) -> str:
    """What a command prints; the error that it ends with is raised."""
    answer = CliRunner().invoke(app, [str(word) for word in words])
    if answer.exception is not None:
        raise answer.exception
    return answer.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A federation under ckks, as a user makes it."""
    folder = tmp_path_factory.mktemp("made") / "federation"
    fedveil("keys", "new", folder, "--host", "server.example", "--host", "192.0.2.7", "--clients", CLIENTS)
    return folder


@pytest.fixture
def federation(made, tmp_path) -> Path:
    """The same, for a test to change."""
    return Path(shutil.copytree(made, tmp_path / "federation"))


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def files(folder: Path) -> dict[str, set[str]]:
    return {party.name: {path.name for path in party.iterdir()} for party in folder.iterdir()}


# What each party gets


@pytest.mark.parametrize("protection", ["ckks", "bfv", "secagg", "none"])
@pytest.mark.parametrize("hosts", [[], ["server.example"]], ids=["one machine", "machines"])
def test_each_party_gets_its_files_and_no_others(tmp_path, protection, hosts) -> None:
    before = os.umask(0)
    try:
        fedveil(
            "keys", "new", tmp_path / "new", "--clients", 2, "--set", f"privacy.protection={protection}", *[w for h in hosts for w in ("--host", h)]
        )  # fmt: skip
    finally:
        os.umask(before)
    encrypted = protection in ("ckks", "bfv")
    client = COMMON | {"identity.key"} | ({"client.key"} if encrypted else set()) | ({"ca.pem"} if hosts else set())
    server = COMMON | ({"server.ctx"} if encrypted else set())
    operator = {"operator": {"ca.key", "ca.pem"}} if hosts else {}
    server |= {"ca.pem", "server.pem", "server.key"} if hosts else set()
    assert files(tmp_path / "new") == {"server": server, "client-1": client, "client-2": client, **operator}
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    if hosts:
        check_server_folder(tmp_path / "new" / "server")
    for number in range(2):
        assert check_client_folder(tmp_path / "new" / f"client-{number + 1}", hosts[0] if hosts else None) == number
        check_agreed(Privacy(protection=protection), tmp_path / "new" / f"client-{number + 1}", number)


def test_no_private_key_is_in_two_folders_but_the_clients_own_of_ciphertexts(made) -> None:
    holders: dict[bytes, set[str]] = {}
    for path in made.rglob("*.key"):
        holders.setdefault(path.read_bytes(), set()).add(str(path.relative_to(made)))
    clients = {f"client-{number}" for number in range(1, CLIENTS + 1)}
    own = [{f"{client}/identity.key"} for client in clients]
    shared = {f"{client}/client.key" for client in clients}
    assert sorted(map(sorted, holders.values())) == sorted(
        map(sorted, [*own, shared, {"server/server.key"}, {"operator/ca.key"}])
    )


def test_one_identity_is_what_flowers_nodes_read_and_what_signs_secure_aggregation(made) -> None:
    for number in range(CLIENTS):
        own = made / f"client-{number + 1}"
        node = load_ssh_private_key((own / "identity.key").read_bytes(), None)  # as flower-supernode does
        assert isinstance(node, ec.EllipticCurvePrivateKey)
        assert isinstance(node.curve, ec.SECP384R1)
        public = json.loads((made / "server" / "registry.json").read_text())[str(number)]
        assert public.startswith("-----BEGIN PUBLIC KEY-----")
        assert serialization.load_pem_public_key(public.encode()) == node.public_key()
        signer, registry = load_identity(own, number)
        assert verify(registry[number], b"statement", signer.sign(b"statement"))


def test_what_is_printed_says_what_goes_where_and_that_the_authority_stays(tmp_path) -> None:
    said = fedveil("keys", "new", tmp_path / "new", "--host", "server.example", "--clients", 5)
    for part in ("key ", "server.example, localhost", "valid until", "client-1 to client-5", "ca.key", "offline"):
        assert part in said
    assert "operator" not in fedveil("keys", "new", tmp_path / "here", "--clients", 5)


def test_a_host_that_is_none_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"'server.example:9092': neither a DNS name nor an IP address"):
        fedveil("keys", "new", tmp_path / "new", "--host", "server.example:9092")
    assert list(tmp_path.iterdir()) == []


# What a server refuses


def secrets_of_others(federation: Path) -> dict[str, bytes]:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])  # of no FedVeil
    key = (federation / "client-1" / "client.key").read_bytes()
    ours, plain = ec.generate_private_key(ec.SECP256R1()), serialization.NoEncryption()
    pem, formats = serialization.Encoding.PEM, serialization.PrivateFormat
    return {
        "a client's key": key,
        "a client's key, cut": key[: len(key) // 2],
        "a client's key, with more behind": key + b"\n-- \n",
        "a client's key without its id": key[: key.rindex(key[-16:]) - 12],
        "a key of BFV": keys.make_keys(Lattice(*PROFILES["exact-small"]))[0],
        "a key of the largest degree": keys.make_keys(Lattice("ckks", 32768, (60, 60)))[0],
        "a context with everything": context.serialize(save_secret_key=True),
        "an identity": (federation / "client-2" / "identity.key").read_bytes(),
        "the authority's key": (federation / "operator" / "ca.key").read_bytes(),
        "the server's own key": (federation / "server" / "server.key").read_bytes(),
        "a key in the old form": ours.private_bytes(pem, formats.TraditionalOpenSSL, plain),
        "a locked key": ours.private_bytes(pem, formats.PKCS8, serialization.BestAvailableEncryption(b"words")),
        "a key among words": b"notes\n\n" + ed25519.Ed25519PrivateKey.generate().private_bytes(pem, formats.OpenSSH, plain),
    }  # fmt: skip


SECRETS = (
    "a client's key", "a client's key, cut", "a client's key, with more behind", "a client's key without its id", "a key of BFV",
    "a key of the largest degree", "a context with everything", "an identity", "the authority's key", "the server's own key",
    "a key in the old form", "a locked key", "a key among words",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(made) -> dict[str, bytes]:
    return secrets_of_others(made)


@pytest.mark.parametrize("place", ["server.ctx", "notes.txt", ".hidden", "within/deep.bin", "registry.json"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_server_with_a_secret_of_others_does_not_start_whatever_it_is_called(
    federation, found, secret, place
) -> None:
    path = federation / "server" / place
    write(path, found[secret])
    with pytest.raises(ProtectionError, match="a server must not have it") as refusal:
        check_server_folder(federation / "server")
    assert str(refusal.value).startswith(f"{path}: ")
    assert found[secret][100:120].hex() not in str(refusal.value)


def test_every_secret_is_tried(found) -> None:
    assert set(found) == set(SECRETS)


@pytest.mark.parametrize("name", ["client.key", "identity.key", "ca.key"])
def test_a_secrets_name_is_enough(federation, name) -> None:
    write(federation / "server" / name, b"")
    with pytest.raises(ProtectionError, match=f"{name}: a secret of another party, by its name"):
        check_server_folder(federation / "server")


def test_a_private_key_is_found_at_the_end_of_4_mib_and_in_a_link(federation) -> None:
    own = federation / "server"
    key = (federation / "operator" / "ca.key").read_bytes()
    write(own / "large", bytes(keys.LARGEST - len(key)) + key)
    with pytest.raises(ProtectionError, match="large: a private key"):
        check_server_folder(own)
    (own / "large").unlink()
    (own / "link").symlink_to(federation / "operator" / "ca.key")
    with pytest.raises(ProtectionError, match="link: a private key"):
        check_server_folder(own)


def test_a_servers_key_file_holds_its_own_key_alone(federation) -> None:
    own = federation / "server"
    write(own / "server.key", (own / "server.key").read_bytes() + (federation / "operator" / "ca.key").read_bytes())
    with pytest.raises(ProtectionError, match=r"server.key: a private key, and a server has one alone"):
        check_server_folder(own)


def test_a_server_does_not_start_on_the_authoritys_own_certificate(federation) -> None:
    for name in ("key", "pem"):
        shutil.copy(federation / "operator" / f"ca.{name}", federation / "server" / f"server.{name}")
    with pytest.raises(ProtectionError, match=r"server.pem: is an authority's certificate, and no server's"):
        check_server_folder(federation / "server")


def test_what_is_public_may_lie_in_a_servers_folder(federation) -> None:
    own = federation / "server"
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    write(own / "public.ctx", context.serialize(save_secret_key=False))
    write(own / "README.txt", b"The client.key and PRIVATE KEY of others stay with them.\n")
    write(own / "key.pub", new_identity()[1])
    write(own / "nothing", b"")
    check_server_folder(own)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_server_key_that_others_can_read_is_refused(federation, mode) -> None:
    (federation / "server" / "server.key").chmod(mode)
    with pytest.raises(ProtectionError, match=r"server.key: others than its owner can read this key; chmod 600"):
        check_server_folder(federation / "server")


@pytest.mark.parametrize("name", ["server.pem", "server.key", "ca.pem", "registry.json"])
@pytest.mark.parametrize("content", [None, b"", b"hello"], ids=["missing", "empty", "words"])
def test_a_server_names_the_file_that_is_missing_or_damaged(federation, name, content) -> None:
    path = federation / "server" / name
    path.unlink()
    if content is not None:
        write(path, content)
    with pytest.raises(ProtectionError) as refusal:
        check_server_folder(federation / "server")
    assert str(refusal.value).startswith(f"{path}: ")
    with pytest.raises(ProtectionError, match="cannot be read"):
        check_server_folder(federation / "nowhere")


def test_a_server_refuses_what_does_not_belong_together(federation, tmp_path) -> None:
    keys.write_keys(tmp_path / "other", None, 1, new_parties(1, PLAIN, ["server.example"]))
    own, others = federation / "server", tmp_path / "other" / "server"
    for names, said in (
        (["server.key"], "server.key: is not the key of the certificate of server.example"),
        (["server.pem"], "server.pem: is not signed by the authority in ca.pem"),
        (["ca.pem"], "server.pem: is not signed by the authority in ca.pem"),
        (["server.key", "server.pem"], "server.pem: is not signed by the authority in ca.pem"),
    ):
        before = {name: (own / name).read_bytes() for name in names}
        for name in names:
            write(own / name, (others / name).read_bytes())
        with pytest.raises(ProtectionError, match=said):
            check_server_folder(own)
        for name, content in before.items():
            write(own / name, content)
    check_server_folder(own)
    shutil.copy(own / "server.pem", own / "ca.pem")
    with pytest.raises(ProtectionError, match=r"ca.pem: is no authority's certificate"):
        check_server_folder(own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda known: {}, "registers no client"),
        (lambda known: {**known, "1": known["0"]}, "client-1 and client-2 have the same key"),
        (lambda known: {**known, "1": "no key"}, "neither PEM nor OpenSSH"),
        (lambda known: {**known, "x": known["0"]}, "is no registry"),
        (lambda known: list(known), "is no registry"),
    ],
    ids=["nobody", "twice", "no key", "no number", "a list"],
)
def test_a_registry_that_is_none_is_refused_on_both_sides(federation, change, said) -> None:
    for party, check in (("server", check_server_folder), ("client-1", lambda own: check_client_folder(own, None))):
        path = federation / party / "registry.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        with pytest.raises(ProtectionError, match=said) as refusal:
            check(path.parent)
        assert str(refusal.value).startswith(f"{path}: ")


# What expires, and is renewed


def make_old(federation: Path) -> None:
    """Put a certificate of 400 days ago in the server's folder."""
    operator = federation / "operator"
    authority = (operator / "ca.key").read_bytes(), (operator / "ca.pem").read_bytes()
    key, certificate = certificates.new_certificate(*authority, ["server.example", "2001:db8::7"], LONG_AGO)
    write(federation / "server" / "server.key", key)
    write(federation / "server" / "server.pem", certificate)


def test_an_expired_certificate_is_said_with_its_date_and_renewed_for_the_same_names(federation) -> None:
    make_old(federation)
    own = federation / "server"
    before = (own / "server.key").read_bytes(), (own / "server.pem").read_bytes()
    with pytest.raises(
        ProtectionError, match=rf"server.pem: expired on {LONG_AGO + timedelta(days=397):%Y-%m-%d}.*fedveil keys renew"
    ):
        check_server_folder(own)
    said = fedveil("keys", "renew", federation)
    assert f"valid until {datetime.now(UTC) + timedelta(days=397):%Y-%m-%d}" in said
    assert "server.example, 2001:db8::7, localhost, 127.0.0.1, ::1" in said
    check_server_folder(own)
    assert (own / "server.key").read_bytes() != before[0]
    assert (own / "server.pem").read_bytes() != before[1]
    assert {path.stat().st_mode & 0o777 for path in (own / "server.key", own / "server.pem")} == {0o600}
    assert {path.name for path in federation.iterdir()} == {"operator", "server", "client-1", "client-2", "client-3"}
    assert check_client_folder(federation / "client-1", "server.example") == 0


def test_a_federation_whose_authority_has_expired_is_made_anew(federation) -> None:
    key, pem = certificates.new_authority(LONG_AGO - timedelta(days=3653))
    for party in ("operator", "server", "client-1"):
        write(federation / party / "ca.pem", pem)
    write(federation / "operator" / "ca.key", key)
    for refuse in (
        lambda: check_server_folder(federation / "server"),
        lambda: check_client_folder(federation / "client-1", "server.example"),
        lambda: renew_certificate(federation),
    ):
        with pytest.raises(ProtectionError, match=r"ca.pem: expired on .*fedveil keys new"):
            refuse()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "operator" / "ca.key").unlink(), "operator/ca.key: cannot be read"),
        (lambda f: (f / "operator" / "ca.key").chmod(0o644), "operator/ca.key: others than its owner can read"),
        (lambda f: write(f / "operator" / "ca.key", (f / "server" / "server.key").read_bytes()), "ca.key: is not the key"),
        (lambda f: (f / "server" / "server.pem").unlink(), "server/server.pem: cannot be read"),
        (lambda f: shutil.copy(f / "operator" / "ca.pem", f / "server" / "server.pem"), "server.pem: is an authority's"),
    ],
    ids=["no key", "an open key", "another key", "no certificate", "another certificate"],
)  # fmt: skip
def test_what_cannot_be_renewed_is_named_and_nothing_changes(federation, change, said) -> None:
    change(federation)
    before = {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()}
    with pytest.raises(ProtectionError, match=said):
        renew_certificate(federation)
    assert {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_the_old_certificate(federation, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match="No space left"):
        renew_certificate(federation)
    monkeypatch.undo()
    check_server_folder(federation / "server")
    assert len(list(federation.iterdir())) == 2 + CLIENTS


# What a client refuses


def test_a_client_knows_its_number_from_its_key_and_not_from_its_folders_name(federation) -> None:
    (federation / "client-3").rename(federation / "hospital")
    assert check_client_folder(federation / "hospital", "server.example") == 2


def test_a_registry_in_openssh_form_is_the_same(federation) -> None:
    path = federation / "client-2" / "registry.json"
    known = json.loads(path.read_text())
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    loaded = {number: serialization.load_pem_public_key(public.encode()) for number, public in known.items()}
    path.write_text(json.dumps({number: key.public_bytes(*ssh).decode() for number, key in loaded.items()}))
    assert check_client_folder(path.parent, "192.0.2.7") == 1


@pytest.mark.parametrize("name", ["identity.key", "client.key"])
def test_a_clients_secret_that_others_can_read_is_refused(federation, name) -> None:
    (federation / "client-1" / name).chmod(0o640)
    with pytest.raises(ProtectionError, match=rf"{name}: others .*chmod 600"):
        check_client_folder(federation / "client-1", "server.example")


@pytest.mark.parametrize("name", ["identity.key", "client.key", "ca.pem", "registry.json", "privacy.toml"])
@pytest.mark.parametrize("content", [None, b"", b"hello"], ids=["missing", "empty", "words"])
def test_a_client_names_the_file_that_is_missing_or_damaged(federation, name, content) -> None:
    path = federation / "client-1" / name
    path.unlink()
    if content is not None:
        write(path, content)
    with pytest.raises(ProtectionError) as refusal:
        check_client_folder(federation / "client-1", "server.example")
    assert str(refusal.value).startswith(f"{path}: ")


def test_a_client_that_is_not_registered_is_refused(federation, tmp_path) -> None:
    write(federation / "client-1" / "identity.key", new_identity()[0])
    with pytest.raises(ProtectionError, match=r"identity.key: this key is not in registry.json"):
        check_client_folder(federation / "client-1", "server.example")


def test_a_client_trusts_one_authority_and_needs_none_without_tls(federation) -> None:
    own = federation / "client-1"
    write(own / "ca.pem", (own / "ca.pem").read_bytes() + certificates.new_authority()[1])
    with pytest.raises(ProtectionError, match=r"ca.pem: holds 2 certificates"):
        check_client_folder(own, "server.example")
    shutil.copy(federation / "server" / "server.pem", own / "ca.pem")
    with pytest.raises(ProtectionError, match=r"ca.pem: is no authority's certificate"):
        check_client_folder(own, "server.example")
    (own / "ca.pem").unlink()
    assert check_client_folder(own, None) == 0
    with pytest.raises(SettingsError, match=r"'https://server.example': neither"):
        check_client_folder(own, "https://server.example")


def test_a_key_made_for_other_parameters_than_were_agreed_is_refused(federation) -> None:
    write(federation / "client-1" / "client.key", keys.make_keys(Lattice(*PROFILES["exact-small"]))[0])
    with pytest.raises(ProtectionError, match=r"client.key: privacy.protection: the key was made for bfv"):
        check_client_folder(federation / "client-1", "server.example")


@pytest.mark.parametrize("kind", ["PEM", "Ed25519"])
def test_an_identity_that_flowers_nodes_cannot_read_is_refused(tmp_path, kind) -> None:
    formats, pem = serialization.PrivateFormat, serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    if kind == "PEM":
        content = ec.generate_private_key(ec.SECP384R1()).private_bytes(pem, formats.PKCS8, plain)
    else:
        content = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, formats.OpenSSH, plain)
    write(tmp_path / "identity.key", content)
    with pytest.raises(ProtectionError, match="Flower's nodes take an ECDSA P-384 key in OpenSSH format alone"):
        load_node_key(tmp_path / "identity.key")


# What people see


def test_a_folder_is_shown_with_all_its_files_and_every_party_of_it(made) -> None:
    shown = describe(made)
    for path in made.rglob("*"):
        if path.is_file():
            assert any(line.startswith(f"{path.relative_to(made)} ") for line in shown), path
    assert fedveil("keys", "show", made).splitlines() == shown
    public = {line.split()[1] for line in shown if "registry.json" in line}
    assert len(public) == CLIENTS
    assert {line.split()[1] for line in shown if "identity.key" in line} == public


def test_a_file_is_shown_as_in_its_folder_and_nothing_secret_is(made) -> None:
    for path in sorted((made / "client-1").iterdir()):
        shown = describe(path)
        everything = [line.split("  ", 1)[1].strip() for line in describe(path.parent) if line.startswith(path.name)]
        assert [line.strip() for line in shown] == everything
        assert max(map(len, shown)) < 200
    assert "ckks, degree 4096" in describe(made / "client-1" / "client.key")[0]
    assert describe(made / "client-1" / "privacy.toml") == ["privacy.protection = 'ckks'"]
    assert "server.example, 192.0.2.7" in describe(made / "server" / "server.pem")[0]


def test_parties_are_shown_in_the_order_of_their_numbers(tmp_path) -> None:
    keys.write_keys(tmp_path / "new", None, 11, new_parties(11, PLAIN, ["server.example"]))
    parties = [line.split("/")[0] for line in describe(tmp_path / "new")]
    assert list(dict.fromkeys(parties)) == ["server", "operator", *(f"client-{number}" for number in range(1, 12))]


def test_what_is_no_key_is_not_shown(made, tmp_path) -> None:
    with pytest.raises(SettingsError, match="holds no file that `fedveil keys new` writes"):
        describe(tmp_path)
    (tmp_path / "words").write_bytes(b"-----BEGIN CERTIFICATE-----\nwords")
    for path in (tmp_path / "words", tmp_path / "missing"):
        with pytest.raises(FedveilError, match=f"^{path}: "):
            describe(path)
    shutil.copy(made / "client-1" / "client.key", tmp_path)
    (tmp_path / "client.key").chmod(0o644)
    with pytest.raises(ProtectionError, match="others than its owner can read"):
        describe(tmp_path)
