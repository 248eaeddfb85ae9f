"""`flwr run .` for real: Flower's SuperLink, its Ray simulation and FedVeil's apps end at the in-process bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
