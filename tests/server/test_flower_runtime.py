"""`flwr run .` for real: Flower's SuperLink, its Ray simulation and FedVeil's apps end at the in-process bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra fedveil[ray]")

CHECKOUT = Path(__file__).parents[2]
SETTINGS = """name = "tiny"
engine = "sequential"
[data]
clients = 4
validation_fraction = 0.2
[federation]
cohort = 3
rounds = 2
strategy = "fedavgm"
[evaluation]
federated = true
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def superlink(tmp_path):
    """A SuperLink of this test's own, in simulation mode; gone at the end with all it started."""
    port, folder = free_port(), Path(sys.executable).parent
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ, "FLWR_HOME": str(home), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": "/tmp", "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    command = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1",
        "--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}", "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_flwr_run_gives_the_bytes_of_clients_one_by_one_in_process(superlink, tmp_path) -> None:
    (tmp_path / "run.toml").write_text(f"experiment = {json.dumps(SETTINGS)}\n")
    answer = subprocess.run(
        ["flwr", "run", ".", "--stream", "--run-config", str(tmp_path / "run.toml")],
        cwd=CHECKOUT, env=superlink, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    said = answer.stdout + answer.stderr
    found = re.search(r"model_sha256 ([0-9a-f]{64})", said)
    assert found, said[-3000:] + (tmp_path / "superlink.log").read_text()[-3000:]

    (tmp_path / "tiny.toml").write_text(SETTINGS)
    own = subprocess.run(
        [sys.executable, "-m", "fedveil", "run", "tiny.toml", "--json", "--out", "own"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert found[1] == json.loads(own.stdout)["model_sha256"]
    (flower,) = (tmp_path / "runs").glob("tiny-*")
    for table in ("metrics.csv", "clients.csv", "experiment.toml"):
        assert (flower / table).read_bytes() == (tmp_path / "own" / table).read_bytes()
