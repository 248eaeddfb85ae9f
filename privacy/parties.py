"""Who takes part in a secure aggregation whose server may lie: a key to sign with for each client, and all public keys for all.

`identity.key` is one client's own; `registry.json` is public and the same for everybody, clients and server.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedveil.core.errors import ProtectionError
from fedveil.privacy.identity import Registry, Signer, load_signer, new_identity

IDENTITY, REGISTRY = "identity.key", "registry.json"


def new_parties(clients: int) -> dict[str, dict[str, bytes]]:
    """A private key for each client, and the registry of the public ones for all: files by party, for `write_keys`."""
    pairs = [new_identity() for _ in range(clients)]
    public = {str(client): key.decode() for client, (_, key) in enumerate(pairs)}
    registry = {REGISTRY: json.dumps(public, indent=1).encode() + b"\n"}
    own = {f"client-{client + 1}": {IDENTITY: private, **registry} for client, (private, _) in enumerate(pairs)}
    return {"server": registry, **own}


def load_registry(folder: Path) -> Registry | None:
    """The public keys of all clients by number, counted from 0; None where the folder has no registry."""
    path = folder / REGISTRY
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        return {int(client): public.encode() for client, public in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ProtectionError(f"{path}: is no registry that `fedveil keys new` wrote ({error})") from None


def load_identity(folder: Path, client: int) -> tuple[Signer | None, Registry | None]:
    """What a client signs with, and the registry; None and None where its folder has no registry.

    folder: the client's own, or one that holds client-1, client-2, ...
    Raise ProtectionError where it has a registry and no key of its own.
    """
    own = folder if (folder / IDENTITY).exists() else folder / f"client-{client + 1}"
    registry = load_registry(own)
    return (None, None) if registry is None else (load_signer(own / IDENTITY), registry)
