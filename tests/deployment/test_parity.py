"""The same settings, seed and partition make the same model on separate machines as in one process, under encryption too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deployment.federations import Federation, federated
from safetensors.numpy import load_file

import fedveil
from fedveil.simulations.holder import open_record

SETTINGS = {"federation.rounds": 3, "seed": 5}


@pytest.fixture(scope="module", params=["bfv", "secagg"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federated(tmp_path_factory.mktemp(request.param), 3, request.param) as made:
        made.start()
        yield made


def test_a_protected_run_between_machines_makes_the_bytes_of_one_in_a_process(
    federation: Federation, tmp_path: Path
) -> None:
    run = federation.order(SETTINGS, reproducible=True)
    run.ends()
    protection = federation.folder.name.rstrip("0123456789")
    settings = {**SETTINGS, "engine": "sequential", "privacy.protection": protection}
    whole = fedveil.run(federation.experiment(settings), out=tmp_path / "run")
    model = run.folder / "model.safetensors"
    if protection == "bfv":
        assert not model.exists()
        model = open_record(run.folder, federation.keys / "client-1", tmp_path / "opened.safetensors")
    deployed, simulated = load_file(model), load_file(whole.run_dir / "model.safetensors")
    assert all(np.array_equal(deployed[name], simulated[name]) for name in simulated)
