"""A machine of a Ray cluster that is lost is no drop-out of its clients: the run ends, and says which machine went."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from helpers.ray_runs import on_ray

from fedveil import Experiment
from fedveil.core.errors import TrainingError
from fedveil.core.record.record import Record
from fedveil.server.checkpoint import load_state
from fedveil.server.federation import prepare, resolve
from fedveil.server.rounds.context import Hooks

LOOKS = {"period_ms": "1000", "failure_threshold": "3", "timeout_ms": "3000", "initial_delay_ms": "1000"}


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="NOT TESTED: a lost raylet needs the extra fedveil[ray]"
)
def test_a_run_that_loses_one_of_two_raylets_ends_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray keeps sockets there, whose paths must be short
    for name, value in LOOKS.items():  # Ray's own take a quarter of a minute
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        # more rounds than there is time for: a raylet is missed after some of them, whose clients have all answered
        small = {"engine": "ray", "federation.rounds": 1000, "data.clients": 4, "federation.cohort": 4}
        experiment = resolve(Experiment.preset("digits").override(small))
        raylet = other.all_processes["raylet"][0].process.pid
        answered: list[int] = []

        def kill(row: dict[str, int], _state: object) -> None:
            answered.append(row["clients"])
            if row["round"] == 1:
                os.kill(raylet, signal.SIGKILL)

        federation, record = prepare(experiment), Record.create(experiment, tmp_path / "ray")
        with pytest.raises(TrainingError, match=r"Ray lost the (machine \S+, with its raylet|process) .*no drop-out"):
            on_ray(federation, record, Hooks(kill, federation.evaluate), None)
        assert answered[1:] == [4] * (len(answered) - 1)
        assert load_state(Record(record.folder))[0].round == len(answered) - 1
    finally:
        cluster.shutdown()
