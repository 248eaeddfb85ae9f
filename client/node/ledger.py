"""The privacy ledger of a deployed client: which file it is, and how the client's app finds it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import platformdirs
from flwr.app import Context

from fedveil.core.errors import ProtectionError
from fedveil.datasets.own.local import parse_source
from fedveil.privacy.trust.ledger import Ledger

log = logging.getLogger("flwr")  # where Flower shows what a node does


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

    Raise ProtectionError where it cannot be used, whose reason stays in this client's log.
    """
    path = str(context.node_config.get("ledger", ""))
    if not path:
        return None
    with in_private():
        return _opened(Path(path), source_name(str(context.node_config["data"])))


@contextmanager
def in_private() -> Iterator[None]:
    """Keep the reason of a ProtectionError in the client's own log, and raise one that tells the server nothing."""
    try:
        yield
    except ProtectionError as error:
        log.warning("refused: %s", error)
        raise ProtectionError("this client's privacy ledger refuses it; the client's own log says why") from None


@lru_cache(maxsize=4)
def _opened(path: Path, source: str) -> Ledger:
    """Keep a process' ledgers open: the whole file is checked once, and later what is new."""
    return Ledger.open(path, source)
