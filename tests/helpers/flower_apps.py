"""Flower apps of one file, made by a test."""

from __future__ import annotations

import textwrap
from pathlib import Path

SERVER = """
import json
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()

def ask(nodes, kind="query", **content):
    return [Message(RecordDict(dict(content)), dst_node_id=node, message_type=kind) for node in nodes]

"""


def make_app(folder: Path, code: str, config: str = "", more: str = "") -> Path:
    """A Flower app of one file, `one_file.py`, with objects `server` and `client`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(
        "[tool.flwr.app.components]\nserverapp = 'one_file:server'\nclientapp = 'one_file:client'\n"
        f"[tool.flwr.app.config]\n{config}\n{more}"
    )
    (folder / "one_file.py").write_text(SERVER + textwrap.dedent(code))
    return folder
