"""What each party of a run brings beside a key for ciphertexts: who it is, who the others are, and what was agreed.

`identity.key` is one client's own, to sign with where the server of a secure aggregation may lie; `registry.json` is public and
the same for everybody, clients and server. `privacy.toml` is the `[privacy]` that a client's keys were made for: the settings
of a run come from the server, and must not talk a client out of its protection.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import tomli_w

from fedveil.core.errors import ProtectionError
from fedveil.core.experiment import Privacy
from fedveil.privacy.identity import Registry, Signer, load_signer, new_identity

IDENTITY, REGISTRY, AGREED = "identity.key", "registry.json", "privacy.toml"


def new_parties(clients: int, privacy: Privacy) -> dict[str, dict[str, bytes]]:
    """Files by party, for `write_keys`: a private key for each client, the public ones of all, and what was agreed."""
    pairs = [new_identity() for _ in range(clients)]
    public = {str(client): key.decode() for client, (_, key) in enumerate(pairs)}
    registry = {REGISTRY: json.dumps(public, indent=1).encode() + b"\n"}
    agreed = {AGREED: tomli_w.dumps(privacy.model_dump(exclude_none=True)).encode()}
    own = {
        f"client-{client + 1}": {IDENTITY: private, **registry, **agreed} for client, (private, _) in enumerate(pairs)
    }
    return {"server": registry, **own}


def check_agreed(privacy: Privacy, folder: Path, client: int) -> None:
    """Raise ProtectionError, naming the setting, where a run's `[privacy]` is not the one that a client's keys were made for.

    folder: the client's own, or one that holds client-1, client-2, ...; without privacy.toml nothing was agreed
    """
    path = next((p for p in (folder / AGREED, folder / f"client-{client + 1}" / AGREED) if p.exists()), None)
    if path is None:
        return
    try:
        agreed = Privacy(**tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ProtectionError(f"{path}: is not what `fedveil keys new` wrote ({error})") from None
    for name, wanted in agreed:
        if getattr(privacy, name) != wanted:
            raise ProtectionError(
                f"the server's settings say privacy.{name} = {getattr(privacy, name)!r}, and this client's keys were made for "
                f"{wanted!r}; it takes part in no other run"
            )


def load_registry(folder: Path) -> Registry | None:
    """The public keys of all clients by number, counted from 0; None where the folder has no registry."""
    path = folder / REGISTRY
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        return {int(client): public.encode() for client, public in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ProtectionError(f"{path}: is no registry that `fedveil keys new` wrote ({error})") from None


def load_identity(folder: Path, client: int) -> tuple[Signer, Registry]:
    """What a client signs with, and the registry.

    folder: the client's own, or one that holds client-1, client-2, ...
    Raise ProtectionError where it lacks one of them: a folder that is named wrongly must not mean a server that is trusted.
    """
    own = folder if (folder / REGISTRY).exists() else folder / f"client-{client + 1}"
    registry = load_registry(own)
    if registry is None:
        raise ProtectionError(
            f"{own}: has no {REGISTRY}, which tells the other clients' keys; fedveil keys new makes it"
        )
    return load_signer(own / IDENTITY), registry
