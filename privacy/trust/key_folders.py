"""The folder of each party of a run: which files it holds beside a key for ciphertexts, and which it must not hold.

`identity.key` belongs to one client. It authenticates the client to the server, and signs where the server of a secure
aggregation may lie. `registry.json` is public and the same for clients and server. `privacy.toml` is the `[privacy]`
that the keys were made for: the settings of a run come from the server, which must not lower a client's protection.
Between machines the server has a certificate too, signed by the authority in the operator's folder. Clients trust that
authority alone.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import tomli_w
from cryptography.x509 import Certificate

from fedveil.core.errors import FedveilError, ProtectionError, SettingsError
from fedveil.core.foreign import reading
from fedveil.core.settings import legacy
from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.keys import values
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic.keys import (
    CLIENT,
    LARGEST,
    SERVER,
    check_lattice,
    fingerprint,
    holds_secret,
    load_client,
    load_server,
    read_file,
    replace_files,
)
from fedveil.privacy.plan import make_lattice
from fedveil.privacy.trust import certificates
from fedveil.privacy.trust.certificates import AUTHORITY, AUTHORITY_KEY, CERTIFICATE, CERTIFICATE_KEY
from fedveil.privacy.trust.identity import Registry, Signer, load_node_key, load_signer, new_identity, public_pem

IDENTITY, REGISTRY, AGREED = "identity.key", "registry.json", "privacy.toml"
_NAMES = (CLIENT, SERVER, IDENTITY, AUTHORITY, AUTHORITY_KEY, CERTIFICATE, CERTIFICATE_KEY, REGISTRY, AGREED)
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")  # PEM of any kind, and OpenSSH


def new_parties(clients: int, privacy: Privacy, hosts: Sequence[str] = ()) -> dict[str, dict[str, bytes]]:
    """Make the files of each party, for `write_keys`: its private key, the public keys of all clients, and `[privacy]`.

    hosts: DNS names and IP addresses of the server on its network. With them the server gets a certificate, and the
    operator the authority that signed it.
    Raise SettingsError where a host is neither.
    """
    pairs = [new_identity() for _ in range(clients)]
    public = {str(client): key.decode() for client, (_, key) in enumerate(pairs)}
    all_ = {
        REGISTRY: json.dumps(public, indent=1).encode() + b"\n",
        AGREED: tomli_w.dumps(privacy.model_dump(exclude_none=True)).encode(),
    }
    server, operator = {}, {}
    if hosts:
        authority_key, authority = certificates.new_authority()
        key, certificate = certificates.new_certificate(authority_key, authority, hosts)
        all_[AUTHORITY] = authority
        server = {CERTIFICATE: certificate, CERTIFICATE_KEY: key}
        operator = {"operator": {AUTHORITY: authority, AUTHORITY_KEY: authority_key}}
    own = {f"client-{client + 1}": {IDENTITY: private, **all_} for client, (private, _) in enumerate(pairs)}
    return {"server": {**server, **all_}, **own, **operator}


def renew_certificate(folder: Path) -> bytes:
    """Replace the server's key and certificate in folder/server, for the same names; return the new certificate.

    folder: as `fedveil keys new` made it, with operator/ and server/
    Raise ProtectionError where one of their files is missing or is not what it should be.
    """
    operator, server = folder / "operator", folder / "server"
    authority_key = read_file(operator / AUTHORITY_KEY, private=True)
    authority = _authority(operator)
    old = _certificate(server, authority)
    with _naming(operator / AUTHORITY_KEY):
        key, new = certificates.new_certificate(
            authority_key, read_file(operator / AUTHORITY, private=False), certificates.hosts_of(old)
        )
    replace_files(server, {CERTIFICATE_KEY: key, CERTIFICATE: new})
    return new


def check_server_folder(folder: Path) -> None:
    """Raise ProtectionError, naming the file, where a server's folder holds others' secrets or is not fit to serve.

    A secret is recognised by its content, under any name and in any folder within; in larger files by their first 4
    MiB. The server's files must be there, belong together, be readable by their owner alone where private, and be valid
    today.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _check_no_secret(path, allowed=path == folder / CERTIFICATE_KEY)
    key = read_file(folder / CERTIFICATE_KEY, private=True)
    certificate = _certificate(folder, _authority(folder))
    with _naming(folder / CERTIFICATE):
        certificates.check_dates(certificate, "`fedveil keys renew` makes a new one, on the operator's machine")
    with _naming(folder / CERTIFICATE_KEY):
        certificates.check_pair(certificate, key)
    _numbers(folder)


def _check_no_secret(path: Path, allowed: bool) -> None:
    """Raise ProtectionError where a file of a server holds a secret.

    allowed: the file may hold one private key, the server's own
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST)
    except OSError as error:
        raise ProtectionError(
            f"{path}: cannot be read ({error.strerror}), and every file of a server is looked at"
        ) from None
    held = None
    if path.name in (CLIENT, IDENTITY, AUTHORITY_KEY):
        held = "a secret of another party, by its name"
    elif holds_secret(content):
        held = "a key that decrypts what clients send, as a whole TenSEAL context or a part of one"
    elif len(_PRIVATE_KEY.findall(content)) > allowed:
        held = f"a private key, and a server has one alone, in {CERTIFICATE_KEY}"
    if held:
        raise ProtectionError(
            f"{path}: {held}; a server must not have it: name the server's own folder, as DIR/server, and keep this file on its "
            "owner's machine alone"
        )


def check_client_folder(folder: Path, host: str | None) -> int:
    """Return the number of the client, from 0, whose folder this is: that of its identity.key in the registry.

    host: of the server it will join over TLS, a DNS name or an IP address; None without TLS, which needs no authority
    Raise ProtectionError, naming the file, where one is missing, damaged, readable by others, does not fit the others,
    or where the key is not registered; SettingsError where the host is neither.
    """
    if not (folder / IDENTITY).exists():
        raise ProtectionError(
            f"{folder / IDENTITY}: is missing; name the folder that `fedveil keys new` made for one client, as DIR/client-1"
        )
    signer = load_node_key(folder / IDENTITY)
    number = _numbers(folder).get(signer.public)
    if number is None:
        raise ProtectionError(
            f"{folder / IDENTITY}: this key is not in {REGISTRY}, so the others do not know it; take the whole folder that "
            "`fedveil keys new` made for this client"
        )
    agreed = _agreed(folder / AGREED)
    if agreed.shows == "sum":
        key = load_client(folder / CLIENT)
        with _naming(folder / CLIENT):
            check_lattice(key.lattice, make_lattice(agreed))
    if host is not None:
        certificates.general_names([host])
        _authority(folder)
    return number


def check_agreed(privacy: Privacy, folder: Path, client: int) -> None:
    """Raise ProtectionError, naming the setting, where a run's `[privacy]` is not that of a client's keys.

    folder: the client's own, or one that holds client-1, client-2, ...; without privacy.toml any `[privacy]` passes
    """
    path = next((p for p in (folder / AGREED, folder / f"client-{client + 1}" / AGREED) if p.exists()), None)
    if path is None:
        return
    agreed, asked = values(_agreed(path)), values(privacy)
    for name in [*agreed, *(name for name in asked if name not in agreed)]:
        if asked.get(name) != agreed.get(name):
            raise ProtectionError(
                f"the server's settings say privacy.{name} = {asked.get(name)!r}, and this client's keys were made for "
                f"{agreed.get(name)!r}; it takes part in no other run"
            )


def load_registry(folder: Path) -> Registry | None:
    """Read the public keys of all clients by number, from 0; None where the folder has no registry."""
    path = folder / REGISTRY
    if not path.exists():
        return None
    with reading(lambda why: ProtectionError(f"{path}: is no registry that `fedveil keys new` wrote ({why})")):
        found = json.loads(path.read_bytes())
        return {int(client): public.encode() for client, public in found.items()}


def load_identity(folder: Path, client: int) -> tuple[Signer, Registry]:
    """Read the key that a client signs with, and the registry.

    folder: the client's own, or one that holds client-1, client-2, ...
    Raise ProtectionError where one is missing, so that a wrong folder never means that the server is trusted.
    """
    own = folder if (folder / REGISTRY).exists() else folder / f"client-{client + 1}"
    registry = load_registry(own)
    if registry is None:
        raise ProtectionError(
            f"{own}: has no {REGISTRY}, which tells the other clients' keys; fedveil keys new makes it"
        )
    return load_signer(own / IDENTITY), registry


def describe(path: Path) -> list[str]:
    """Describe a file of keys without its secrets, for people to compare: fingerprints, names, dates.

    path: one of the files that `fedveil keys new` writes, or a folder of them, or one of parties, for all files in it
    Raise ProtectionError where a file is damaged, or is private and others can read it; SettingsError where there is
    none.
    """
    if not path.is_dir():
        return _describe_file(path)
    parties = sorted((p for p in path.iterdir() if p.is_dir()), key=_order)
    files = [place / name for place in (path, *parties) for name in _NAMES if (place / name).is_file()]
    if not files:
        raise SettingsError(f"{path}: holds no file that `fedveil keys new` writes")
    width = max(len(str(file.relative_to(path))) for file in files)
    return [f"{file.relative_to(path)!s:{width}}  {line}" for file in files for line in _describe_file(file)]


def _order(party: Path) -> tuple[str, int, str]:
    """Sort client-10 after client-9."""
    return party.name.rpartition("-")[0], len(party.name), party.name


def _describe_file(path: Path) -> list[str]:
    if path.name == REGISTRY:
        numbers = _numbers(path.parent)
        return [f"{_fingerprint(public)}  client-{number + 1}" for public, number in numbers.items()]
    if path.name == AGREED:
        agreed = _agreed(path)
        default = values(Privacy(protection=ProtectionChoice(agreed.protection.name)))
        chosen = {k: v for k, v in values(agreed).items() if k == "protection" or v != default.get(k)}
        return [", ".join(f"privacy.{name} = {value!r}" for name, value in chosen.items())]
    content = read_file(path, private=False)
    if b"-----BEGIN CERTIFICATE" in content:
        with _naming(path):
            return [certificates.certificate_words(content)]
    if _PRIVATE_KEY.search(content):
        return [f"{_fingerprint(load_signer(path).public)}  a private key, shown by its public half"]
    key = load_server(path) if path.name == SERVER else load_client(path)
    lattice = key.lattice
    return [
        f"{fingerprint(key.key_id)}  {lattice.scheme}, degree {lattice.degree}, primes of {list(lattice.primes)} bits"
    ]


def _fingerprint(public: bytes) -> str:
    """Return the start of the SHA-256 of a public key in PEM."""
    return fingerprint(sha256(public).digest())


def _numbers(folder: Path) -> dict[bytes, int]:
    """Return the numbers of all clients, from 0, by their public keys in PEM.

    Raise ProtectionError where there are none.
    """
    path, numbers = folder / REGISTRY, dict[bytes, int]()
    registry = load_registry(folder)
    if not registry:
        raise ProtectionError(
            f"{path}: {'is missing' if registry is None else 'registers no client'}; take the whole folder that "
            "`fedveil keys new` made for one party, as DIR/server or DIR/client-1"
        )
    for client, public in registry.items():
        with _naming(path):
            key = public_pem(public)
        if key in numbers:
            raise ProtectionError(f"{path}: client-{numbers[key] + 1} and client-{client + 1} have the same key")
        numbers[key] = client
    return numbers


def _agreed(path: Path) -> Privacy:
    """Read the whole of privacy.toml: a file that was cut short must not mean no protection."""
    with reading(lambda why: ProtectionError(f"{path}: is not what `fedveil keys new` wrote ({why})")):
        found = tomllib.loads(path.read_text("utf-8"))
        privacy = Privacy(**legacy.read({"privacy": found})["privacy"])
    if "protection" not in found:
        raise ProtectionError(f"{path}: is not what `fedveil keys new` wrote (it names no protection)")
    return privacy


def _authority(folder: Path) -> Certificate:
    """Read the authority's certificate in a folder, and check that it is valid today."""
    content = read_file(folder / AUTHORITY, private=False)
    with _naming(folder / AUTHORITY):
        authority = certificates.load_authority(content)
        certificates.check_dates(authority, "`fedveil keys new` makes keys for a new federation")
    return authority


def _certificate(folder: Path, authority: Certificate) -> Certificate:
    """Read the server's certificate in a folder, and check that the authority signed it."""
    content = read_file(folder / CERTIFICATE, private=False)
    with _naming(folder / CERTIFICATE):
        certificate = certificates.load_certificate(content)
        certificates.check_issued(certificate, authority)
    return certificate


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of any error."""
    try:
        yield
    except FedveilError as error:
        raise ProtectionError(f"{path}: {error}") from None
