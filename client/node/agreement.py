"""A client's agreement to a run: it signs the run's manifest once, and acts on nothing that the manifest does not say.

A run that the server started with clients' keys has a manifest (`privacy/trust/manifest.py`). The client signs it
(stage `query.manifest`), and with its greeting receives the signatures of the others. From then on each message is
compared with what was signed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import MANIFEST, RUN, SIGNATURES
from fedveil.privacy.trust.identity import Registry, Signer
from fedveil.privacy.trust.key_folders import load_identity
from fedveil.privacy.trust.manifest import UNSIGNED, Manifest, check_signatures, differences, now, read_signatures, sign

# records in a node's context: the manifest that the client agreed to, and the SHA-256 of the one it signed, by run
STATE, SIGNED = "fedveil.manifest", "fedveil.signed"


def signs(context: Context, keys: str) -> bool:
    """Say whether this client takes part only in runs with a manifest: it has keys, and a server of another party."""
    return bool(keys) and "data" in context.node_config


def countersign(
    context: Context, keys: str, config: Mapping[str, Any], clock: Callable[[], datetime] = now
) -> tuple[Manifest, bytes]:
    """Return the manifest that a server asks a client to sign, and the client's signature.

    config: of the message
    Raise ProtectionError, with what differs, where the manifest is not of what the server sent this client.
    """
    signer, registry = _identity(context, keys)
    manifest = _checked(context, _bytes(config, MANIFEST), registry, clock())
    signed = context.state.get(SIGNED)
    if isinstance(signed, ConfigRecord) and signed.get(manifest.run, manifest.digest) != manifest.digest:
        raise ProtectionError("the server asks for a second signature of this run, of another manifest")
    context.state[SIGNED] = ConfigRecord({manifest.run: manifest.digest})
    return manifest, sign(manifest, signer)


def agree(
    context: Context, keys: str, config: Mapping[str, Any], clock: Callable[[], datetime] = now
) -> tuple[Manifest, dict[int, bytes]]:
    """Return the manifest and the signatures that a server brings, and store the manifest in the node's context.

    Raise ProtectionError where fewer than more than half of the registered clients signed it, or it is of other
    settings than those the server sent this client.
    """
    _, registry = _identity(context, keys)
    manifest = _checked(context, _bytes(config, MANIFEST), registry, clock())
    signatures = read_signatures(_bytes(config, SIGNATURES))
    check_signatures(manifest, signatures, registry)
    before = context.state.get(STATE)
    if isinstance(before, ConfigRecord) and before[MANIFEST] != manifest.content:
        raise ProtectionError("the server brings a second manifest of this run, which has one")
    context.state[STATE] = ConfigRecord({MANIFEST: manifest.content})
    return manifest, signatures


def agreed(context: Context, keys: str, config: Mapping[str, Any], clock: Callable[[], datetime] = now) -> Manifest:
    """Return the manifest that a client agreed to, for a message of its run.

    config: of the message
    Raise ProtectionError where there is none, it has expired, or what the server sends now is not what it says.
    """
    kept = context.state.get(STATE)
    if not isinstance(kept, ConfigRecord):
        raise ProtectionError(
            "this client agreed to no manifest of this run: the server sent none, or the client was started anew"
        )
    _, registry = _identity(context, keys)
    manifest = _checked(context, _bytes(kept, MANIFEST), registry, clock())
    if RUN in config and config[RUN] != bytes.fromhex(manifest.run):
        raise ProtectionError("the server's message names another run than the manifest that clients signed")
    return manifest


def manifest_in(state: RecordDict) -> bytes | None:
    """Return the content of the manifest that a node's state holds; None where its client takes part without one."""
    kept = state.get(STATE)
    return _bytes(kept, MANIFEST) if isinstance(kept, ConfigRecord) else None


def digest_in(state: RecordDict) -> bytes:
    """Return the SHA-256 of the manifest that a node's state holds; zeros where its client takes part without one."""
    kept = manifest_in(state)
    return UNSIGNED if kept is None else sha256(kept).digest()


def _checked(context: Context, content: bytes, registry: Registry, moment: datetime) -> Manifest:
    """Read a manifest; raise ProtectionError where it is not valid now, or says else than the run's configuration."""
    given = context.run_config
    manifest = _compared(
        content,
        str(given["experiment"]),
        str(given.get("words", "")),
        bool(given.get("reproducible")),
        tuple(sorted(registry.items())),
    )
    manifest.check_dates(moment)
    return manifest


@lru_cache(maxsize=16)  # a round has up to six messages
def _compared(
    content: bytes, experiment: str, words: str, reproducible: bool, registered: tuple[tuple[int, bytes], ...]
) -> Manifest:
    """Read a manifest; raise ProtectionError where it is not that of these settings."""
    manifest = Manifest.read(content)
    expected = Manifest.of(
        manifest.run, experiment, words, dict(registered), reproducible=reproducible, created=manifest.created
    )
    if manifest.digest != expected.digest:
        found = differences(manifest, expected)
        raise ProtectionError("the run's manifest is not of what the server sent this client: " + "; ".join(found[:5]))
    return manifest


def _identity(context: Context, keys: str) -> tuple[Signer, Registry]:
    return load_identity(Path(keys), int(str(context.node_config["partition-id"])))


def _bytes(config: Mapping[str, Any], key: str) -> bytes:
    found = config.get(key)
    if not isinstance(found, bytes):
        raise ProtectionError(
            f"the server's message brings no {key}: every run with clients' keys has a signed manifest"
        )
    return found
