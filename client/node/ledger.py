"""The privacy ledger of a deployed client: which file it is, and how the client's app finds it."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import platformdirs
from flwr.app import Context

from fedveil.datasets.own.local import parse_source
from fedveil.privacy.trust.ledger import Ledger


def source_name(data: str) -> str:
    """Return the name of a client's data, the same from every folder: an absolute path, or DATASET:PARTITION/OF.

    data: the value of `--data`
    """
    source = parse_source(data)
    if source.path is None:
        return f"{source.dataset}:{source.partition}/{source.of}"
    return str(source.path.expanduser().resolve())


def ledger_path(data: str) -> Path:
    """Return the ledger of a client's data, in its user's data folder: one for all servers, keys and state folders."""
    source = source_name(data)
    words = re.sub(r"[^\w.-]+", "-", source.rpartition(os.sep)[2] if os.path.isabs(source) else source)[:40]
    folder = Path(platformdirs.user_data_dir("fedveil")) / "ledgers"
    return folder / f"{words}-{sha256(source.encode()).hexdigest()[:16]}.ledger"


def ledger_of(context: Context) -> Ledger | None:
    """Return the ledger of this node's data; None where the node has none: a simulation, or Flower's own SuperNode.

    Raise ProtectionError where it cannot be used.
    """
    path = str(context.node_config.get("ledger", ""))
    if not path:
        return None
    return _opened(Path(path), source_name(str(context.node_config["data"])))


@lru_cache(maxsize=4)
def _opened(path: Path, source: str) -> Ledger:
    """Keep a process' ledgers open: the whole file is checked once, and later what is new."""
    return Ledger.open(path, source)
