"""The Flower App Bundle of a deployed run: it names FedVeil's apps, and holds no code.

A client runs the FedVeil that is installed on its own machine. It compares the bundle it receives with the bundle that
its own FedVeil makes: the same version and the same code give the same bytes.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib import resources
from importlib.metadata import version
from importlib.resources.abc import Traversable

import tomli_w

from fedveil.core.errors import DeploymentError
from fedveil.core.foreign import printable, reading

# folders whose code determines what a run computes
ROOMS = ("core", "models", "datasets", "privacy", "algorithms", "client", "server")
# keys of a run's configuration, whose values are text
SETTINGS = ("experiment", "words", "record", "control", "resume", "keys", "limit", "reproducible")
_PROJECT, _CONTENT = "pyproject.toml", ".info/CONTENT"
_LARGEST = 1 << 20  # bytes of a received project file that are read


@cache
def code() -> str:
    """Return the SHA-256 of the source files of this FedVeil that take part in a run, in hexadecimal."""
    found = sha256()
    for room in ROOMS:
        for name, content in sorted(_sources(resources.files(f"fedveil.{room}"), room)):
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _sources(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each Python file in a folder and its subfolders."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{name}/{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{name}/{entry.name}", entry.read_bytes()


@cache
def bundle() -> bytes:
    """Return the bundle of this FedVeil, a Flower App Bundle (FAB)."""
    project = {
        "project": {"name": "fedveil", "version": version("fedveil"), "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedveil",
                    "components": {"serverapp": "fedveil.server.app:app", "clientapp": "fedveil.client.app:app"},
                    "config": dict.fromkeys(SETTINGS, ""),
                }
            },
            "fedveil": {"code": code()},
        },
    }
    content = tomli_w.dumps(project).encode()
    manifest = f"{_PROJECT},{sha256(content).hexdigest()},{8 * len(content)}"
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        for name, part in ((_PROJECT, content), (_CONTENT, manifest.encode())):
            entry = zipfile.ZipInfo(name)  # dated 1980, so that the bytes repeat
            entry.create_system = 3
            archive.writestr(entry, part)
    return whole.getvalue()


def check_bundle(content: bytes) -> None:
    """Raise DeploymentError, naming both versions, where a bundle differs from that of this FedVeil.

    Nothing of a foreign bundle is executed or unpacked to disk; only its pyproject.toml is read.
    """
    if content == bundle():
        return
    ours = f"FedVeil {version('fedveil')} (code {code()[:12]})"
    theirs = _described(content)
    if theirs == ours:
        raise DeploymentError(
            f"the server's bundle says that it is of {ours}, which this client runs, and is not: it was made by somebody else; "
            "nothing of it is used"
        )
    raise DeploymentError(
        f"the server's bundle is of {theirs}, and this client runs {ours}; a client runs the code on its own "
        "machine and no other: install the same FedVeil on both"
    )


def _described(content: bytes) -> str:
    """Return the name and version in a foreign bundle, in words."""
    try:
        with reading(DeploymentError), zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo(_PROJECT).file_size > _LARGEST:
                return "a bundle with an oversized project file"
            found = tomllib.loads(archive.read(_PROJECT).decode())
            name, number = printable(found["project"]["name"], 40), printable(found["project"]["version"], 40)
            theirs = found.get("tool", {}).get("fedveil", {}).get("code")
    except DeploymentError:
        return "no app that can be read"
    if name == "fedveil" and isinstance(theirs, str):
        return f"FedVeil {number} (code {printable(theirs[:12], 12)})"
    return f"'{name}' {number}, not of FedVeil"
