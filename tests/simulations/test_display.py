"""What a person sees: lines where nobody can see a bar, a bar that counts to the end, pictures of every kind."""

from __future__ import annotations

import io
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from fedveil import Experiment, run
from fedveil.core.record.record import Record
from fedveil.datasets.federated import load
from fedveil.simulations import plots
from fedveil.simulations.display import Display, summary_text
from fedveil.simulations.plots import draw_partition, draw_record
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


def test_the_end_of_a_run_names_what_there_is_and_who_decrypted() -> None:
    costs = {"bytes_up_ratio": 1, "bytes_down_ratio": 2, "seal_seconds": 0.1, "open_seconds": 0.2, "clipped": 0}
    privacy = {**costs, "largest_error": 1e-6, "error_bound": None, "readers": "the key's holders"}
    told = {
        "rounds": 2,
        "seconds": 1.0,
        "stopped": None,
        "best_round": 1,
        "doubt": None,
        "bytes_up": 1,
        "bytes_down": 1,
        "run_dir": "r",
    }
    sealed = {**told, "model_sha256": None, "protection": "ckks", "privacy": privacy, "validation_accuracy": 0.5}
    shown = summary_text(SimpleNamespace(summary=sealed))
    assert "(best.sealed)" in shown
    assert "decrypting 0.20 s of all clients" in shown  # whoever cannot read the model decrypted nothing
    assert "plots/accuracy.png, metrics.csv, model.sealed" in shown
    open_ = {**sealed, "model_sha256": "ab", "validation_accuracy": None}
    shown = summary_text(SimpleNamespace(summary=open_))
    assert "(best.safetensors)" in shown
    assert "of this process" in shown
    assert "plots/accuracy.png" not in shown


def drawn(folder: Path, rows: str) -> list[str]:
    """The names of the pictures of a record with these metrics, drawn without a warning."""
    record = Record.create(SETTINGS, folder)
    record.path("metrics.csv").write_text(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [path.name for path in draw_record(record)]
    assert sorted(path.name for path in record.path("plots").iterdir()) == sorted(names)
    return names


def test_what_a_run_has_no_values_of_is_not_drawn_and_nothing_is_warned_of(tmp_path) -> None:
    """A deployed run may have no score: no picture is better than an empty one."""
    head = "round,train_loss,test_accuracy,test_loss,test_f1,validation_accuracy"
    assert drawn(tmp_path / "a", f"{head}\n0,,,,,\n1,0.5,,,,\n") == ["loss.png"]
    assert drawn(tmp_path / "b", f"{head}\n0,,,,,\n") == []
    assert drawn(tmp_path / "c", f"{head}\n0,,0.1,2,,\n1,0.5,0.8,1,,\n") == ["accuracy.png", "loss.png"]


def test_the_untrained_model_s_score_does_not_flatten_the_others(tmp_path, monkeypatch) -> None:
    settings = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.5, "evaluation.federated": False}
    record = Record.create(SETTINGS.override(settings), tmp_path / "run")
    record.path("metrics.csv").write_text("round,test_accuracy\n0,0.06\n1,0.9\n2,0.95\n")
    axes_seen = []
    figure = plots._figure

    @contextmanager
    def watched(*given, **options):
        with figure(*given, **options) as axes:
            yield axes
            axes_seen.append(([list(line.get_xdata()) for line in axes.lines], axes.get_ylim(), axes.get_title("left"),
                              [text.get_text() for text in axes.get_legend().get_texts()]))  # fmt: skip

    monkeypatch.setattr(plots, "_figure", watched)
    plots.draw_record(record)
    ((rounds, (low, _), title, legend),) = axes_seen
    assert rounds == [[1, 2]]
    assert low > 0.85
    assert legend == ["test accuracy (untrained: 0.06)"]
    assert "noise multiplier 0.5, clip 1" in title


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
