"""What a person sees: lines where nobody can see a bar, a bar that counts to the end, pictures of every kind."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from fedveil import Experiment, run
from fedveil.datasets.federated import load
from fedveil.simulations.display import Display, summary_text
from fedveil.simulations.plots import draw_partition
from fedveil.simulations.shows import partition_table

SETTINGS = Experiment.preset("digits").override({
    "federation.rounds": 2, "federation.cohort": 3, "training.epochs": 1, "model.hidden": [8],
    "data.validation_fraction": 0.2, "evaluation.federated": True,
})  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_shown_to_its_end(terminal, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    display = Display(console)
    result = run(SETTINGS, out=tmp_path / "run [b]", display=display)
    shown = console.file.getvalue()
    assert "digits: 1,438 training and 359 test examples" in shown
    assert "run [b]" in shown
    last = f"test accuracy {result.summary['test_accuracy']:.4f}  validation accuracy"
    assert last in shown
    if terminal:
        assert "6/6" in shown  # clients that trained, not those that evaluated
    else:
        assert [line.split()[1] for line in shown.splitlines() if line.startswith("round")] == ["0/2", "1/2", "2/2"]
    assert result.summary["model_sha256"] in summary_text(result)


@pytest.mark.parametrize("settings", [{}, {"data.clients": 200, "data.partition": "shards"}, {"data.clients": 1200}])
def test_a_partition_is_drawn_and_listed(settings, tmp_path) -> None:
    experiment = SETTINGS.override(settings)
    federated = load(experiment.data, 0)
    draw_partition(experiment, federated, tmp_path / "picture.png")
    picture = matplotlib.image.imread(tmp_path / "picture.png")
    assert picture.shape[0] > 500
    assert np.ptp(picture[..., :3]) > 0.5
    console = Console(file=io.StringIO(), width=200)
    console.print(partition_table(experiment, federated))
    listed = console.file.getvalue()
    assert f"over {experiment.data.clients:,} clients" in listed
    counts = federated.holdings.partition.counts(federated.dataset.train.labels, 10)
    row = next(line for line in listed.splitlines() if line.split()[:1] == ["3"])
    assert row.split()[1:] == [str(counts[3].sum()), *(str(n) if n else "·" for n in counts[3])]
