"""docs/deploy.md is true: its walk ends as it says, its commands, settings, units and messages are those of this FedVeil."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from helpers.captures import begin, end, left_over, other_than_tls, shared, walked
from helpers.machines import eventually, need_root
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedveil import Experiment
from fedveil.cli import app
from fedveil.client.app import STAGES, evaluation_reply, training_reply
from fedveil.client.learning.contribution import Contributions, Instructions, Sealed
from fedveil.client.node.policy import Policy
from fedveil.core.examples import Task
from fedveil.core.metrics import MetricSet, Scores
from fedveil.core.wire.messages import METRICS
from fedveil.datasets.own.local import TASKS
from fedveil.privacy.homomorphic.keys import load_client
from fedveil.simulations.engine.grid import InProcessGrid

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "deploy.md").read_text()
UNITS = sorted((CHECKOUT / "docs" / "deploy").glob("*.service"))
INSTALLED = "/opt/fedveil/bin/fedveil"  # where the units expect it
ROUNDS = 6
START = 120.0  # seconds for a server to start on a machine that has other work


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = sorted({
    line.partition("$ ")[2].split(" | ")[0]
    for block in blocks("console") for line in block.splitlines() if re.match(r"[a-z0-9-]+\$ fedveil ", line)
})  # fmt: skip


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def understood(command: str) -> bool:
    """Whether a command and its options exist; it is not run."""
    words = [word for word in shlex.split(command)[1:] if word != "--help"]
    return CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


@pytest.mark.long
def test_the_walk_ends_as_it_says_and_neither_the_network_nor_the_server_sees_the_model(tmp_path) -> None:
    walk = walked(tmp_path / "walk", "--capture")
    lines = [line for line in walk.said.splitlines() if re.match(r"(server|operator|client-\d)\$ ", line)]
    assert all(understood(line.partition("$ ")[2].split(" | ")[0]) for line in lines if "$ fedveil" in line)
    assert re.search(rf"^{walk.record.name} +stopped +[1-9]/{ROUNDS} ", walk.said, re.MULTILINE)
    assert (
        walk.said.count(f"{walk.record.name} stops; go on with: fedveil resume {walk.record.name} --on localhost") == 1
    )
    assert list(pd.read_csv(walk.record / "metrics.csv")["round"]) == list(range(ROUNDS + 1))
    updates = pd.read_csv(walk.record / "clients.csv").query("stage == 'train'")
    assert sorted(zip(updates["round"], updates["client"], strict=True)) == [
        (number, client) for number in range(1, ROUNDS + 1) for client in range(3)
    ]

    machines = walk.folder
    assert not (walk.record / "model.safetensors").exists()
    model = b"".join(tensor.tobytes() for tensor in load_file(machines / "client-1" / "model.safetensors").values())
    on_server = [path for path in (machines / "server").rglob("*") if path.is_file()]
    assert len(model) > 10_000
    assert walk.record / "model.sealed" in on_server
    passed = b"\n".join(walk.streams.values())
    assert len(passed) > 3 * ROUNDS * (walk.record / "model.sealed").stat().st_size, "the capture does not hold the run"
    assert {words for words in map(other_than_tls, walk.streams.values()) if words} == set()
    secrets = {"the model": model, "a client's messages": (machines / "client-1" / "messages.csv").read_bytes()}
    for name in ("client-1", "client-2", "client-3", "operator"):
        for path in sorted((machines / "operator" / "federation" / name).glob("*.key")):
            for part in private_parts(path):
                secrets[f"{path.name} of {name}, {len(part)} bytes"] = part
            assert shared(private_parts(path)[-1], path.read_bytes()), f"a copy of {path} would not be found"
    assert (
        len(secrets) == 2 + 3 * (1 + 2) + 2
    )  # of each client its identity and the key for decryption; the authority's key
    places = {"the network": passed, **{str(path): path.read_bytes() for path in on_server}}
    for place, content in places.items():
        found = shared(b"".join(secrets.values()), content)
        assert not found, f"{[name for name, secret in secrets.items() if found in secret]} can be read on {place}"


def private_parts(path: Path) -> list[bytes]:
    """What only its owner may have of a key file: public halves, ids and parameters, which others hold, are left out."""
    if path.name == "client.key":
        return [load_client(path).secret]
    content = path.read_bytes()
    load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
    key = load(content, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    number = key.private_numbers().private_value.to_bytes(48)
    text = b"".join(content.splitlines()[1:-1])
    start = b64decode(text).index(number)
    return [number, text[(start + 2) // 3 * 4 : (start + 48) // 3 * 4]]  # four letters stand for three bytes


@pytest.mark.long
def test_a_walk_that_is_interrupted_takes_down_what_it_made(tmp_path) -> None:
    need_root()
    folder = tmp_path / "walk"
    process = begin(folder)
    try:
        said = folder / "server" / "output.txt"
        eventually(lambda: said.exists() and "state " in said.read_text(), START, "the server started")
        assert left_over(process.pid, folder) != []
    finally:
        end(process)
    assert process.returncode == 130
    assert left_over(process.pid, folder) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--fast", "x"], "unknown option --fast"),
        ([], "name one folder"),
        (["--insecure", "x"], "--insecure uses no keys"),
        (["."], "must be a new folder"),
    ],
    ids=["unknown-option", "no-folder", "insecure-and-protected", "old-folder"],
)
def test_the_script_says_why_it_does_not_start(options, why, tmp_path) -> None:
    need_root()
    script = CHECKOUT / "docs" / "deploy" / "three_machines.sh"
    environment = {"FEDVEIL": str(Path(sys.executable).with_name("fedveil")), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    answer = subprocess.run(
        [script, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert answer.returncode == 1
    assert why in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_understood(command) -> None:
    assert understood(command)


def test_the_page_has_commands_that_would_not_be_understood_with_another_option() -> None:
    assert len(COMMANDS) >= 10
    assert not understood(f"{COMMANDS[0]} --unheard-of")


def test_the_policy_of_the_page_is_a_policy_and_its_table_has_every_key(tmp_path) -> None:
    (example,) = blocks("ini")[:1]
    (tmp_path / "policy.toml").write_text(example)
    assert Policy.read(tmp_path / "policy.toml") != Policy()
    rows = re.findall(r"^\| `(\w+)` \|", section("What a client refuses"), re.MULTILINE)
    assert rows == list(Policy.model_fields)


def test_the_page_names_every_number_that_a_client_replies_with() -> None:
    InProcessGrid(ClientApp(), 1, {})  # messages belong to a run
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    runtime: Any = SimpleNamespace(experiment=Experiment(privacy={"protection": "secagg"}), keys="", deployed=True)
    instructions = Instructions(1, 0.1, None, True, bytes(16), 1, {})
    one: dict[str, Any] = dict.fromkeys(("examples", "loss", "steps", "global_loss"), np.ones(1))
    trained = Contributions([0], instructions, {}, updates=[Sealed(b"", 0, 0.0)], refusals=[None], **one)
    tasks = [TASKS["sms"], Task("text", (8,), (), 50, "next_token")]
    told = [Scores(1, 0.0, dict.fromkeys(MetricSet.of(task).whole, 0)) for task in tasks]
    replies = [
        training_reply(message, runtime, trained, 0, 0.0),
        *(evaluation_reply(message, 0, scores, 0.0) for scores in told),
    ]
    names = {name for reply in replies for name in reply.content[METRICS]}
    said = section("What leaves a client's machine")
    missing = [name for name in [*sorted(names), *STAGES] if f"`{name}`" not in said]
    assert len(names) >= 12
    assert missing == []


def constants(path: Path) -> list[str]:
    """The texts in a Python file, what is filled in replaced by a space."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(p.value if isinstance(p, ast.Constant) else " " for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_messages_in_the_table_of_troubles_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(.+?)` \|", section("When something goes wrong"), re.MULTILINE)
    folders = ("core", "client", "server", "privacy", "datasets", "front", "simulations")
    texts = [text for folder in folders for path in (CHECKOUT / folder).rglob("*.py") for text in constants(path)]
    assert len(rows) >= 12
    for row in rows:
        for part in (piece.strip() for piece in row.split("…")):
            assert any(part in text for text in texts), f"{row}: nobody says '{part}'"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_hardened_and_start_commands_that_exist(path) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(path)
    service = unit["Service"]
    program, _, words = service["ExecStart"].partition(" ")
    assert program == INSTALLED
    assert understood(f"fedveil {words}")
    assert service["User"] not in ("", "root")
    wanted = {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "UMask": "0077",
        "CapabilityBoundingSet": "", "Restart": "on-failure", "KillMode": "mixed",
    }  # fmt: skip
    assert {name: service[name] for name in wanted} == wanted
    (state,) = re.findall(r"--state (\S+)", words)
    assert Path(state).is_relative_to(service["ReadWritePaths"])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_no_fault_with_the_units(path, tmp_path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT TESTED: needs systemd-analyze")
    installed = path.read_text().replace(INSTALLED, str(Path(sys.executable).with_name("fedveil")))
    (tmp_path / path.name).write_text(installed)
    answer = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / path.name], capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")


def test_there_are_two_units_and_the_page_leads_to_them() -> None:
    assert [path.name for path in UNITS] == ["fedveil-client.service", "fedveil-server.service"]
    assert all(f"](deploy/{path.name})" in PAGE for path in UNITS)
