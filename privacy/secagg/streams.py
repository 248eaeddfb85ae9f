"""Keys that two clients agree on, and the streams of masks made of them.

X25519 for agreement (RFC 7748), HKDF with SHA-256 (RFC 5869) for one key a purpose, AES-256 in counter mode for masks,
AES-256-GCM for the shares that clients send each other through the server.
"""

from __future__ import annotations

import os
import struct
from functools import lru_cache
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading

KEY = 32  # bytes of every key, seed and public key
NONCE, TAG = 12, 16  # bytes


def new_key() -> bytes:
    """Make a private key for `agree`, from the operating system's randomness."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the public half of a private key."""
    return agreement(private).public_key().public_bytes_raw()


def agreement(private: bytes) -> X25519PrivateKey:
    """Prepare a private key for `agree` with many peers: preparing takes as long as one agreement."""
    return X25519PrivateKey.from_private_bytes(private)


def agree(private: X25519PrivateKey, public: bytes, peer: int) -> bytes:
    """Return the secret shared by a private key and a peer's public key.

    Raise ProtectionError, naming the peer, for a bad one.
    """
    with reading(lambda _: ProtectionError(f"client {peer}: its public key is no usable X25519 key")):
        return private.exchange(X25519PublicKey.from_public_bytes(public))


def pair_key(agreed: bytes, digest: bytes, one: int, other: int) -> bytes:
    """Return the key of the mask of two clients, the same for both: `digest` binds it to a session."""
    return _derive(agreed, b"pair mask", digest, min(one, other), max(one, other))


def bound(digest: bytes, shown: bytes) -> bytes:
    """Return a session's digest, bound to what its clients were shown; unchanged where `shown` is empty."""
    return sha256(digest + shown).digest() if shown else digest


def self_key(seed: bytes, digest: bytes, client: int) -> bytes:
    """Return the key of a client's self mask."""
    return _derive(seed, b"self mask", digest, client, client)


def stream(key: bytes, size: int) -> np.ndarray:
    """Return a mask: uint32 [size], AES-256 in counter mode, little-endian.

    The counter starts at 0, because a key is for one stream.
    """
    data = np.empty(4 * size + 15, np.uint8)  # the library wants room for one more block
    Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update_into(_zeros(4 * size), data.data)
    return data[: 4 * size].view("<u4")


def seal(agreed: bytes, digest: bytes, sender: int, receiver: int, secret: bytes) -> bytes:
    """Encrypt a secret for one receiver, bound to its sender and this session: nonce, ciphertext, tag.

    The nonce is random, so that a client restored from an older state does not use a key with one nonce twice.
    """
    nonce = os.urandom(NONCE)
    key = _derive(agreed, b"shares", digest, sender, receiver)
    return nonce + AESGCM(key).encrypt(nonce, secret, _bind(b"shares", digest, sender, receiver))


def unseal(agreed: bytes, digest: bytes, sender: int, receiver: int, sealed: bytes) -> bytes:
    """Decrypt what `seal` encrypted; raise ProtectionError, naming the sender, where it is anything else."""
    key = _derive(agreed, b"shares", digest, sender, receiver)
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], _bind(b"shares", digest, sender, receiver))
    except (InvalidTag, ValueError) as error:
        raise ProtectionError(
            f"client {sender}: its shares for client {receiver} cannot be read: they were changed on the way, "
            "or come from another session"
        ) from error


@lru_cache(maxsize=1)
def _zeros(length: int) -> bytes:
    return bytes(length)


def _bind(purpose: bytes, digest: bytes, one: int, other: int) -> bytes:
    return b"fedveil " + purpose + b"\0" + digest + struct.pack(">QQ", one, other)


def _derive(secret: bytes, purpose: bytes, digest: bytes, one: int, other: int) -> bytes:
    return HKDF(SHA256(), KEY, salt=None, info=_bind(purpose, digest, one, other)).derive(secret)
