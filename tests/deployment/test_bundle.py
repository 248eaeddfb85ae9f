"""A server that was taken over sends clients a bundle with code in it: no client executes any of it."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w
from deployment.federations import ROUNDS, Federation, federated
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from helpers.machines import Program, eventually

from fedveil.core.wire.bundle import code
from fedveil.server.flower import control_client, take_task

SERVER = """
import json
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    messages = [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in grid.get_node_ids() for kind in ("train", "query")]
    replies = grid.send_and_receive(messages, timeout=90)
    told = [reply.error.reason if reply.has_error() else "DONE" for reply in replies]
    Path("{told}.new").write_text(json.dumps(told))
    Path("{told}.new").rename("{told}")
"""
CLIENT = """
from pathlib import Path
Path("{touched}").touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    with federated(folder, 2) as made:
        made.start()
        yield made


def bundle_of(files: Mapping[str, str]) -> bytes:
    """A Flower App Bundle."""
    manifest = "\n".join(
        f"{name},{sha256(text.encode()).hexdigest()},{8 * len(text.encode())}" for name, text in files.items()
    )
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, text in {**files, ".info/CONTENT": manifest}.items():
            archive.writestr(name, text)
    return whole.getvalue()


def start(federation: Federation, content: bytes) -> int:
    """Start an app on the SuperLink itself, as who took over the server's user can."""
    (words,) = [words for words in federation.at.commands.values() if "run_superlink()" in words]
    path = Path(words.split("run_superlink() ")[1].split()[0])
    with control_client(path) as control:
        fab = Fab(hash_str=sha256(content).hexdigest(), content=content)
        run = int(control.StartRun(StartRunRequest(fab=fab)).run_id)
    taken = take_task(path)
    assert taken is not None
    assert taken[0] == run
    command = [sys.executable, "-P", "-c", "from fedveil.server.flower import run_app; run_app()", path]
    home = str(federation.state / "flower")
    Program(federation.at, command, federation.folder, "mischief", FEDVEIL_TASK_TOKEN=taken[1], FLWR_HOME=home)
    return run


def test_a_bundle_that_hides_the_installed_package_behind_its_own_is_refused_unopened(
    federation: Federation, tmp_path: Path
) -> None:
    told, touched = tmp_path / "told.json", tmp_path / "touched"
    project = {
        "project": {"name": "fedveil", "version": version("fedveil"), "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedveil",
                    "components": {"serverapp": "mischief:app", "clientapp": "fedveil.client.app:app"},
                    "config": {},
                }
            },
            "fedveil": {"code": code()},
        },
    }
    evil = CLIENT.format(touched=touched)
    content = bundle_of({
        "pyproject.toml": tomli_w.dumps(project),
        "mischief.py": SERVER.format(told=told),
        "fedveil/__init__.py": evil,
        "fedveil/client/__init__.py": evil,
        "fedveil/client/app.py": evil,
        "sitecustomize.py": evil,
    })  # fmt: skip
    assert start(federation, content)
    eventually(told.exists, ROUNDS, "the stranger's server app has its replies")
    replies = json.loads(told.read_text())
    assert len(replies) == 4  # both kinds, from both clients
    for reply in replies:
        assert (
            f"says that it is of FedVeil {version('fedveil')} (code {code()[:12]}), which this client runs, and is not"
            in reply
        )
    assert not touched.exists()
    for number in federation.hosts:
        assert (
            "the server's bundle says that it is of FedVeil"
            in (federation.client_state(number) / "client.log").read_text()
        )
    run = federation.order({"federation.rounds": 1, "federation.deadline": 60})  # clients still serve FedVeil
    run.ends()


def test_the_code_that_clients_refused_is_code_that_runs(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    exec(CLIENT.format(touched=touched), {})
    assert touched.exists()
