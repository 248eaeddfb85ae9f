"""`flwr run .` for real: Flower's SuperLink, its Ray simulation and FedVeil's apps end at the in-process bytes."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra '.[ray]'")
pytestmark = pytest.mark.slow

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


def flwr_run(superlink: dict[str, str], folder: Path, **config: str) -> str:
    """Run FedVeil's apps on a SuperLink; return the model's SHA-256 that the server logs at the end."""
    (folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    answer = subprocess.run(
        ["flwr", "run", ".", "--stream", "--run-config", str(folder / "run.toml")],
        cwd=CHECKOUT, env=superlink, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    said = answer.stdout + answer.stderr
    (folder / "flwr.out").write_text(said)
    found = re.search(r"model_sha256 ([0-9a-f]{64})", said)
    assert found, said[-3000:] + (folder / "superlink.log").read_text()[-3000:]
    return found[1]


def fedveil(folder: Path, *words: str) -> str:
    """What a command of FedVeil prints."""
    command = [sys.executable, "-m", "fedveil", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=True).stdout


@pytest.mark.parametrize("superlink", ["installs"], indirect=True)
def test_flwr_run_gives_the_bytes_of_clients_one_by_one_in_process(superlink, tmp_path) -> None:
    sha256 = flwr_run(superlink, tmp_path, experiment=SETTINGS)
    (tmp_path / "tiny.toml").write_text(SETTINGS)
    own = fedveil(tmp_path, "run", "tiny.toml", "--json", "--out", "own")
    assert sha256 == json.loads(own)["model_sha256"]
    (flower,) = (tmp_path / "runs").glob("tiny-*")
    for table in ("metrics.csv", "clients.csv", "experiment.toml"):
        assert (flower / table).read_bytes() == (tmp_path / "own" / table).read_bytes()
    told, here = (json.loads((run / "environment.json").read_text()) for run in (flower, tmp_path / "own"))
    assert told["versions"] == here["versions"]  # those that were installed, and none that uv fetched
    assert told["versions"]["torch"] == metadata.version("torch")
    said = (tmp_path / "flwr.out").read_text()
    assert "No additional application dependencies needed installation" in said  # uv was asked
    assert "Installed:" not in said


def test_an_encrypted_flwr_run_leaves_a_model_that_only_the_key_opens(superlink, tmp_path) -> None:
    protected = SETTINGS.replace("fedavgm", "fedavg") + '[privacy]\nprotection = "bfv"\n'
    fedveil(tmp_path, "keys", "new", "keys", "--set", "privacy.protection=bfv")
    sha256 = flwr_run(superlink, tmp_path, experiment=protected, keys=str(tmp_path / "keys"))
    (flower,) = (tmp_path / "runs").glob("tiny-*")
    assert sha256 == hashlib.sha256((flower / "model.sealed").read_bytes()).hexdigest()
    assert not (flower / "model.safetensors").exists()
    assert not [path for path in flower.rglob("*") if path.name.endswith(".key")]

    (tmp_path / "tiny.toml").write_text(protected)
    fedveil(tmp_path, "run", "tiny.toml", "--quiet", "--out", "own")
    fedveil(tmp_path, "keys", "open", str(flower), "--keys", "keys")
    assert (flower / "model.safetensors").read_bytes() == (tmp_path / "own" / "model.safetensors").read_bytes()
    assert (flower / "clients.csv").read_bytes() == (tmp_path / "own" / "clients.csv").read_bytes()
    with (flower / "metrics.csv").open() as by_flower, (tmp_path / "own" / "metrics.csv").open() as by_own:
        for row, wanted in zip(csv.DictReader(by_flower), csv.DictReader(by_own), strict=True):
            for column, value in wanted.items():  # nobody on the server's side may evaluate
                assert row[column] == ("" if column.startswith("test_") else value)
