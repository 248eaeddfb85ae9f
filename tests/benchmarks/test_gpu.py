"""The table of a GPU: its rows are experiments, its bare loop is measured, and where there is no GPU it says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.bench import bench
from benchmarks.data import POOL
from fedveil.core.errors import SettingsError
from fedveil.datasets.federated import load


def test_every_row_is_an_experiment_on_the_gpu_with_its_cohort() -> None:
    for row in gpu.ROWS:
        asked = gpu.experiment(row, "cuda")
        assert (asked.device, asked.federation.cohort) == ("cuda", row.cohort)
        assert asked.federation.rounds == row.rounds + 2


def test_rows_become_a_table_with_the_devices_name_and_what_no_time_was_left_for_is_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, evaluates = (replace(row, cohort=2, rounds=1) for row in gpu.ROWS[-2:])
    found = gpu.measure(rows=[replace(plain, by_hand=True), evaluates], device="cpu")
    ((title, headings, cells),) = gpu.grids(found)
    assert title == "On the CPU, as a stand-in"
    assert [len(row) for row in cells] == [len(headings)] * 2
    first, second = found["rows"]
    assert first["ms_per_client"] > 0
    assert first["by_hand_ms_per_client"] > 0
    assert second["by_hand_ms_per_client"] is None
    assert first["model_sha256"] == second["model_sha256"]  # clients that evaluate train as others do
    monkeypatch.setattr(gpu, "LONGEST", -1.0)
    found = gpu.measure(rows=[plain], device="cpu")
    assert found["rows"] == []
    assert found["notes"] == ["MLP, holding a tenth out, cohort 2: not measured, as -1 s had passed"]


def test_clients_of_a_pool_overlap_and_hold_the_same_at_every_call() -> None:
    data = load(gpu.experiment(gpu.ROWS[0], "cpu").data, seed=0)
    held = [data.client(k)[0] for k in (0, 1, 0)]
    assert [len(examples) for examples in held] == [600] * 3
    assert np.array_equal(held[0].features, held[2].features)
    assert not np.array_equal(held[0].features, held[1].features)
    assert held[0].source is held[1].source
    assert len(held[0].source) == POOL
    assert data.counts(np.array([0, 1])).sum(1).tolist() == [600, 600]


def test_without_a_gpu_and_with_settings_of_ones_own_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="PyTorch finds no CUDA device here"):
        bench(["gpu"], settings={}, peers={})
    with pytest.raises(SettingsError, match=r"--workers: the rows of `gpu` have their own"):
        bench(["gpu"], settings={"workers": 2}, peers={})
