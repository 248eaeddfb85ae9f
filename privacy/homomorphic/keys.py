"""The files of a run's key: `client.key` for those who encrypt and decrypt, `server.ctx` for the one who only adds.

Both are TenSEAL contexts that `tenseal.context_from` opens, with more fields, which TenSEAL skips: a checksum, and an id
of 16 random bytes that the pair shares. `client.key` holds the secret key, 32 random bytes with which clients
authenticate what they add (`mac.py`), and no other key; `server.ctx` holds no key.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any
from zlib import crc32

import tenseal  # type: ignore[import-untyped]

from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.foreign import reading
from fedveil.privacy.homomorphic import mac
from fedveil.privacy.homomorphic.parameters import Lattice
from fedveil.privacy.homomorphic.seal import Ring, read_context, read_fields, read_ring, write_field

CLIENT, SERVER = "client.key", "server.ctx"
KEY_ID = 16  # bytes
LARGEST = 2**22  # bytes: four times the secret key of degree 32768
# fields of a TenSEAL context; FedVeil adds the last three at the end of the file
_PARAMETERS, _PUBLIC, _PRIVATE, _KIND, _MAC, _CHECKSUM, _ID = 1, 2, 3, 4, 1002, 1001, 1000
_SEAL = b"\x5e\xa1\x10"  # how SEAL's objects begin
_SYMMETRIC = 1  # TenSEAL's kind of encryption that needs no public key
_FLAGS, _SCALE = 2, 3  # fields of its public part where that holds no public, relinearisation or Galois key


@dataclass(frozen=True)
class ClientKey:
    """A client's key, which decrypts what any client of the run sends.

    version: of the SEAL in use; context: the file, which TenSEAL opens; secret: the secret key, as SEAL's bytes
    mac: 32 bytes that authenticate uploads and sums; empty in a key of FedVeil 0.1.0
    """

    key_id: bytes
    ring: Ring
    version: tuple[int, int]
    parameters: bytes = field(repr=False)
    context: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    mac: bytes = field(repr=False)

    @property
    def lattice(self) -> Lattice:
        """The parameters the key is made for."""
        return self.ring.lattice


@dataclass(frozen=True)
class ServerContext:
    """What a server needs to add ciphertexts: their parameters, and no key.

    version: of the SEAL in use; context: the file, which TenSEAL opens
    """

    key_id: bytes
    ring: Ring
    version: tuple[int, int]
    context: bytes = field(repr=False)

    @property
    def lattice(self) -> Lattice:
        """The parameters the clients' key is made for."""
        return self.ring.lattice


def make_keys(lattice: Lattice) -> tuple[bytes, bytes]:
    """Make a new secret key: the content of `client.key` and of `server.ctx`.

    Its randomness is the operating system's. The server's file is written without the secret key from the start: a
    TenSEAL context that is made public afterwards still decrypts. Raise SettingsError where SEAL has no such
    parameters.
    """
    schemes, kinds = tenseal.SCHEME_TYPE, tenseal.ENCRYPTION_TYPE
    try:
        context = tenseal.context(
            schemes.CKKS if lattice.scheme == "ckks" else schemes.BFV,
            lattice.degree,
            plain_modulus(lattice.plain_bits, lattice.degree) if lattice.scheme == "bfv" else None,
            list(lattice.primes),
            kinds.SYMMETRIC,
            n_threads=1,
        )
    except (ValueError, RuntimeError) as error:
        raise SettingsError(
            f"privacy.protection.degree = {lattice.degree} with privacy.protection.primes = {list(lattice.primes)}: SEAL has no such "
            f"parameters ({error})"
        ) from None
    key_id, authentication = secrets.token_bytes(KEY_ID), write_field(_MAC, secrets.token_bytes(mac.KEY))
    client = _sign_off(_serialize(context, secret=True) + authentication, key_id)
    return client, _sign_off(_serialize(context, secret=False), key_id)


def _sign_off(context: bytes, key_id: bytes) -> bytes:
    """Return a file: the context, a checksum, and the key's id.

    SEAL's own bytes have no checksum, and a changed bit may give another key.
    """
    checksum = crc32(key_id, crc32(context)).to_bytes(4, "little")
    return context + write_field(_CHECKSUM, checksum) + write_field(_ID, key_id)


def _serialize(context: Any, secret: bool) -> bytes:
    kept = context.serialize(
        save_public_key=False, save_secret_key=secret, save_galois_keys=False, save_relin_keys=False
    )
    return bytes(kept)


def plain_modulus(bits: int, degree: int) -> int:
    """Return the largest prime of so many bits that is 1 modulo 2 degree, so that BFV has slots.

    It equals SEAL's PlainModulus::Batching, which TenSEAL's public interface lacks. Raise SettingsError where there is
    none.
    """
    step = 2 * degree
    number = ((1 << bits) - 2) // step * step + 1
    while number >> (bits - 1):
        if _is_prime(number):
            return number
        number -= step
    raise SettingsError(
        f"privacy.protection.plain_bits = {bits}: no such prime is 1 modulo {step}; take more bits or a smaller degree"
    )


def _is_prime(number: int) -> bool:
    """Say whether a number is prime by Miller and Rabin's test.

    It is certain below 3.3 * 10^24 for these bases (Sorenson and Webster 2015).
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power: int = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def write_keys(
    folder: Path, lattice: Lattice | None, clients: int, others: Mapping[str, Mapping[str, bytes]] | None = None
) -> bytes:
    """Make a new key and a folder for each party: server/server.ctx, client-1/client.key, ...; return the key's id.

    lattice: None makes no key, and returns nothing; others: more files, by party and name, which may name more parties
    Only the owner can read the files, from the first byte on. A failure leaves nothing behind.
    Raise SettingsError where the folder is not empty, or cannot be made.
    """
    client, server = (b"", b"") if lattice is None else make_keys(lattice)
    others = others or {}
    parties: dict[str, dict[str, bytes]] = {"server": {SERVER: server}}
    parties |= {f"client-{number}": {CLIENT: client} for number in range(1, clients + 1)}
    parties |= {party: {} for party in others if party not in parties}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SettingsError(
                f"{folder}: exists already and is not empty; a new run needs a new key: name another folder"
            )
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # mode 0700
        try:
            for party, files in parties.items():
                (unfinished / party).mkdir(mode=0o700)
                for name, content in {**(files if lattice else {}), **others.get(party, {})}.items():
                    _write(unfinished / party / name, content)
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
        except BaseException:
            rmtree(unfinished)
            raise
    except OSError as error:
        raise SettingsError(f"{folder}: the keys cannot be written there ({error.strerror})") from None
    return server[-KEY_ID:]


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace files in a party's folder, each as a whole and readable by its owner alone; raise SettingsError."""
    try:
        unfinished = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        )  # beside the folder, which must hold keys alone
        try:
            for name, content in files.items():
                _write(unfinished / name, content)
            for name in files:
                (unfinished / name).replace(folder / name)
        finally:
            rmtree(unfinished)
    except OSError as error:
        raise SettingsError(f"{folder}: the keys cannot be written there ({error.strerror})") from None


def _write(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load_client(path: Path, old: bool = False) -> ClientKey:
    """Read a client's key from a file; raise ProtectionError where others can read it, or it is no client's key.

    old: accept a key of FedVeil 0.1.0, which authenticates nothing
    """
    content = read_file(path, private=True)
    parts, key_id, ring = _parts(path, content)
    private = [value for value in parts.get(_PRIVATE, ()) if isinstance(value, bytes)]
    if not private:
        raise ProtectionError(f"{path}: holds no secret key; it is a server's file: a client needs {CLIENT}")
    try:
        keys = [value for number, value in read_fields(private[0]) if number == 1]
    except ProtectionError:
        raise _damaged(path, "its private part cannot be read") from None
    if len(private) != 1 or len(keys) != 1 or not isinstance(keys[0], bytes):
        raise _damaged(path, "it does not hold one secret key")
    context = _context(path, content, key_id)
    if not context.has_secret_key():
        raise _damaged(path, "TenSEAL finds no secret key in it")
    parameters, authentication = parts[_PARAMETERS][0], b"".join(map(bytes, parts.get(_MAC, ())))
    assert isinstance(parameters, bytes)  # checked by _parts
    if not authentication and not old:
        raise ProtectionError(
            f"{path}: has no key for authentication: it was made by FedVeil 0.1.0, whose clients use any sum that a server "
            "sends; make new keys for everybody (fedveil keys new)"
        )
    if len(parts.get(_MAC, ())) > 1 or len(authentication) not in (0, mac.KEY):
        raise _damaged(path, f"its key for authentication has {len(authentication)} bytes, and {mac.KEY} are needed")
    return ClientKey(key_id, ring, _version(context), parameters, content, keys[0], authentication)


def load_server(path: Path) -> ServerContext:
    """Read a server's context from a file; raise ProtectionError where it holds a key, before TenSEAL opens it."""
    content = read_file(path, private=False)
    parts, key_id, ring = _parts(path, content)
    if _PRIVATE in parts or _MAC in parts:
        raise ProtectionError(
            f"{path}: holds a secret key, and a server must not have one; start it with {SERVER}, and remove this "
            "file from the server's machine"
        )
    context = _context(path, content, key_id)
    if context.has_secret_key():
        raise ProtectionError(f"{path}: TenSEAL finds a secret key in it, and a server must not have one")
    return ServerContext(key_id, ring, _version(context), content)


def holds_secret(content: bytes) -> bool:
    """Say whether a file is a TenSEAL context with a private part, of any parameters.

    A context that cannot be read whole counts as one. content: the file's first LARGEST bytes
    """
    if _SEAL not in content:
        return False
    try:
        parts = read_context(content)
    except ProtectionError:  # cut short, added to, or larger than LARGEST
        return content[:1] == write_field(_PARAMETERS, b"")[:1] and _SEAL in content[:8]
    ours = any(isinstance(value, bytes) and value.startswith(_SEAL) for value in parts.get(_PARAMETERS, ()))
    return ours and (_PRIVATE in parts or _MAC in parts)


def read_file(path: Path, private: bool) -> bytes:
    """Read a key's file; raise ProtectionError where it is unreadable or too large.

    private: refuse a file that others than its owner can read
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if private and os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077:
                raise ProtectionError(f"{path}: others than its owner can read this key; chmod 600 {path}")
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ProtectionError(
            f"{path}: cannot be read ({error.strerror}); fedveil keys new makes a folder of keys for each party"
        ) from None
    if len(content) > LARGEST:
        raise _damaged(path, f"it has more than {LARGEST:,} bytes")
    return content


def _parts(path: Path, content: bytes) -> tuple[dict[int, list[int | bytes]], bytes, Ring]:
    """Return the fields of a context, the key's id and the ring, from its bytes alone."""
    try:
        parts = read_context(content)
        if any(not isinstance(value, bytes) for number in parts if number != _KIND for value in parts[number]):
            raise ProtectionError("a part of it is a bare number")
        parameters, ids = parts.get(_PARAMETERS, [b""])[0], parts.get(_ID, [b""])
        assert isinstance(parameters, bytes)
        ring, _ = read_ring(parameters)
        public = {
            number for value in parts.get(_PUBLIC, ()) if isinstance(value, bytes) for number, _ in read_fields(value)
        }
    except ProtectionError as error:
        raise _damaged(path, str(error)) from None
    key_id = ids[0]
    if len(ids) != 1 or not isinstance(key_id, bytes) or len(key_id) != KEY_ID:
        raise _damaged(path, "it carries no key id of FedVeil")
    unknown = sorted(set(parts) - {_PARAMETERS, _PUBLIC, _PRIVATE, _KIND, _MAC, _CHECKSUM, _ID})
    if unknown or len(parts[_PARAMETERS]) != 1:
        raise _damaged(path, f"it holds parts that FedVeil does not write {unknown or ''}".rstrip())
    if parts.get(_KIND) != [_SYMMETRIC]:
        raise _damaged(path, "it is not for encryption with the secret key")
    if public - {_FLAGS, _SCALE}:
        raise _damaged(path, "it holds a public, relinearisation or Galois key, which FedVeil never makes")
    return parts, key_id, ring


def _context(path: Path, content: bytes, key_id: bytes) -> Any:
    end = len(_sign_off(b"", key_id))
    if content != _sign_off(content[:-end], key_id):
        raise _damaged(path, "its checksum is wrong: it was changed after it was made")
    with reading(lambda why: _damaged(path, f"TenSEAL refuses it ({why})")):
        return tenseal.context_from(content, n_threads=1)


def _version(context: Any) -> tuple[int, int]:
    """Return the version of SEAL that TenSEAL brings, as it writes it now."""
    parameters = read_context(_serialize(context, secret=False))[_PARAMETERS][0]
    assert isinstance(parameters, bytes)
    return read_ring(parameters)[1]


def _damaged(path: Path, reason: str) -> ProtectionError:
    return ProtectionError(f"{path}: not a key file that `fedveil keys new` wrote, or damaged: {reason}")


def fingerprint(key_id: bytes) -> str:
    """Return the start of a key's id, for people to compare between machines: 3f2a-91bc-07d4-55e1."""
    digits = key_id.hex()
    return "-".join(digits[start : start + 4] for start in range(0, 16, 4))


def find_client_key(folder: Path, client: int) -> Path:
    """Return the path of a client's key.

    It is folder/client.key, or in a whole run's folder the client's own, or else the first client's.
    client: counted from 0. All clients of a run hold the same key.
    Raise ProtectionError, naming the paths, where there is none.
    """
    places = [folder / CLIENT, folder / f"client-{client + 1}" / CLIENT, folder / "client-1" / CLIENT]
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(str(place) for place in dict.fromkeys(places))
    raise ProtectionError(f"no key for client {client}: there is no {tried}; make one with fedveil keys new {folder}")


def check_lattice(found: Lattice, wanted: Lattice) -> None:
    """Raise SettingsError, naming the setting, where a key was made for other parameters than the settings want."""
    names: dict[str, Callable[[Lattice], object]] = {
        "privacy.protection": lambda lattice: lattice.scheme,
        "privacy.protection.degree": lambda lattice: lattice.degree,
        "privacy.protection.primes": lambda lattice: list(lattice.primes),
        "privacy.protection.plain_bits": lambda lattice: lattice.plain_bits if lattice.scheme == "bfv" else 0,
    }
    for name, of in names.items():
        if of(found) != of(wanted):
            raise SettingsError(
                f"{name}: the key was made for {of(found)}, and the settings want {of(wanted)}; make a key with these "
                "settings (fedveil keys new), or take the settings that the key was made for"
            )
