"""The identity of a client: a key pair for signatures, whose public half the others have registered.

Keys are ECDSA P-384 or Ed25519, in PEM or OpenSSH files. A Flower node authenticates with the same key, and reads only
P-384 in OpenSSH files. New keys are therefore of that kind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading

Registry = Mapping[int, bytes]  # public keys, PEM or OpenSSH, by the client's number

SIGNATURE = 128  # bytes, at most: 64 for Ed25519, up to 104 for P-384


class Signer:
    """A private key that signs for one client."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
        self._key = key

    def sign(self, data: bytes) -> bytes:
        """Sign data: ECDSA with SHA-384, or Ed25519."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(hashes.SHA384()))

    @property
    def public(self) -> bytes:
        """The public half as PEM, which the others register."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def new_identity() -> tuple[bytes, bytes]:
    """Make a new P-384 key pair: the private key, OpenSSH, and the public key, PEM.

    Keep the private key in a file that only its owner can read.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, Signer(key).public


def load_signer(path: str | Path) -> Signer:
    """Read the private key in a file.

    Raise ProtectionError where it is none, or where others than its owner can read it.
    """
    try:
        with Path(path).open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read()
    except OSError as error:
        raise ProtectionError(f"{path}: the private key cannot be read: {error.strerror}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ProtectionError(
            f"{path}: others can read this private key (mode {stat.S_IMODE(mode):04o}); "
            f"make a new key, or `chmod 600 {path}` if nobody has"
        )
    load = serialization.load_ssh_private_key if _openssh(content) else serialization.load_pem_private_key
    none = ProtectionError(f"{path}: no private key in PEM or OpenSSH format without a passphrase")
    with reading(lambda _: none):  # the library's message may quote the key
        key = load(content, password=None)
    if not (isinstance(key, ed25519.Ed25519PrivateKey) or _is_p384(key)):
        raise ProtectionError(f"{path}: neither an ECDSA P-384 key nor an Ed25519 one")
    assert isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey)
    return Signer(key)


def load_node_key(path: str | Path) -> Signer:
    """Read the private key in a file, which Flower's nodes must be able to use too.

    Raise ProtectionError as `load_signer` does, and for any other kind of key.
    """
    signer = load_signer(path)
    if not (_openssh(Path(path).read_bytes()) and _is_p384(signer._key)):
        raise ProtectionError(
            f"{path}: Flower's nodes take an ECDSA P-384 key in OpenSSH format alone; `fedveil keys new` makes such keys"
        )
    return signer


def public_pem(public: bytes) -> bytes:
    """Return a registered public key as PEM, where equal keys are equal bytes.

    Raise ProtectionError for an unsupported key.
    """
    return _load_public(public).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Say whether a signature of data is by the owner of a public key; raise ProtectionError for an unsupported key."""
    key = _load_public(public)
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _load_public(public: bytes) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    load = serialization.load_pem_public_key if public.startswith(b"-----") else serialization.load_ssh_public_key
    with reading(lambda why: ProtectionError(f"a registered public key is in neither PEM nor OpenSSH format: {why}")):
        key = load(public)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    raise ProtectionError("a registered public key is neither ECDSA P-384 nor Ed25519")


def _is_p384(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)


def _openssh(content: bytes) -> bool:
    return content.lstrip().startswith(b"-----BEGIN OPENSSH")
