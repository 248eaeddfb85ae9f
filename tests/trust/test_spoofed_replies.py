"""A registered client that answers in another's name, by Flower's own calls, through the gateway to a real SuperLink."""

from __future__ import annotations

import io
import json
import time
import zipfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response
from helpers.gates import SECONDS, gate, superlink
from helpers.machines import eventually

from fedveil.core.wire.flower import act_as, identify
from fedveil.server.flower import TASK_TOKEN
from fedveil.server.serving.superlink import start_process, take

pytestmark = pytest.mark.slow
ASKING = """
import json
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=90)
    told = {str(reply.metadata.src_node_id): dict(reply.content["config"])["who"] for reply in replies}
    Path("TOLD.new").write_text(json.dumps(told))
    Path("TOLD.new").rename("TOLD")
"""


def bundle(told: Path) -> bytes:
    """An app whose server asks each node once, and writes who says to have answered for which."""
    components = {"serverapp": "asking:app", "clientapp": "asking:app"}
    about = {
        "project": {"name": "asking", "version": version("fedveil"), "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "test", "components": components, "config": {}}}},
    }
    files = {"pyproject.toml": tomli_w.dumps(about), "asking.py": ASKING.replace("TOLD", str(told))}
    manifest = [f"{name},{sha256(text.encode()).hexdigest()},{8 * len(text.encode())}" for name, text in files.items()]
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, text in {**files, ".info/CONTENT": "\n".join(manifest)}.items():
            archive.writestr(name, text)
    return whole.getvalue()


def reply(message: Message, who: str, source: int) -> Message:
    """A reply that names its source."""
    act_as(message.metadata.run_id, source, 1)
    made = Message(RecordDict({"config": ConfigRecord({"who": who})}), reply_to=message)
    identify(made, made.object_id)
    return made


def push(node: Any, made: Message) -> None:
    """Push a reply with a node's own key, as Flower's SuperNode does."""
    send, push_object = node[2], node[6]
    missing, session = send(made, get_object_tree(made), 0.0)
    push_objects(
        get_all_nested_objects(made),
        lambda object_id, content: push_object(made.metadata.run_id, session, object_id, content),
        object_ids_to_push=set(missing),
    )


def message_of(node: Any) -> Message:
    """The message that a node is given."""
    receive, deadline = node[1], time.monotonic() + SECONDS
    while (given := receive()) is None:
        assert time.monotonic() < deadline
    message: Message = given[0]
    return message


def test_a_client_cannot_answer_for_another_even_if_it_knows_its_message(tmp_path: Path) -> None:
    told, content = tmp_path / "told.json", bundle(tmp_path / "told.json")
    refused: Exception | None = None
    nodes: tuple[int, ...] = ()
    # Flower's connection swallows what is raised within its block, so that nothing is asserted there
    with (
        superlink(tmp_path) as link,
        gate(link) as (address, gateway),
        link.control() as control,
        http_request_response(address, True) as liar,
        http_request_response(address, True) as victim,
    ):
        nodes = liar[0], victim[0]
        run = control.StartRun(StartRunRequest(fab=Fab(hash_str=sha256(content).hexdigest(), content=content))).run_id
        app = start_process(link, "asking", {TASK_TOKEN: take(link, run)}, tmp_path / "asking.log")
        asked, own = message_of(victim), message_of(liar)
        try:
            push(liar, reply(asked, "the liar", victim[0]))
        except RunNotRunningException as error:  # what Flower's SuperNode makes of a 403
            refused = error
        push(liar, reply(own, "itself", liar[0]))
        push(victim, reply(asked, "itself", victim[0]))
        eventually(told.exists, SECONDS, "the run has its replies")
        app.stop()
    assert json.loads(told.read_text()) == {str(node): "itself" for node in nodes}
    assert refused is not None
    assert gateway.refused[-1][2] == "a reply in another client's name"
