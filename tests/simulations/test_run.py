"""A whole run in this process: same bytes, resumable, stops when told, and leaves a record that can be trusted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.experiments import digits
from safetensors.numpy import load_file

from fedveil import DataError, Experiment, Result, SettingsError, TrainingError, run
from fedveil.core.errors import Interrupted
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.simulations.display import Display

SMALL = {
    "data.clients": 6,
    "model.hidden": [16],
    "model.dropout": 0.2,
    "training.epochs": 1,
    "federation.cohort": 3,
    "federation.rounds": 3,
}


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Pictures take longer than these little runs; the test of the record draws them."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])


def small(**settings) -> Experiment:
    sizes = "model__name" not in settings  # another network has none of these settings
    return digits({key: SMALL[key] for key in SMALL if sizes or not key.startswith("model.")}, **settings)


def csv(folder: Path) -> bytes:
    return (folder / "metrics.csv").read_bytes() + (folder / "clients.csv").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path) -> None:
    random.seed(1)
    first = run(small(), out=tmp_path / "a")
    random.seed(2)
    torch.manual_seed(99)
    second = run(small(), out=tmp_path / "b")
    other = run(small(seed=1), out=tmp_path / "c")
    assert first.summary["model_sha256"] == second.summary["model_sha256"] != other.summary["model_sha256"]
    assert csv(tmp_path / "a") == csv(tmp_path / "b") != csv(tmp_path / "c")


def test_a_run_reads_and_leaves_no_global_random_state(tmp_path) -> None:
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    run(small(), out=tmp_path / "run")
    assert states() == before


def test_a_run_equals_a_plain_loop_over_clients_and_rounds(tmp_path) -> None:
    settings = small(federation__cohort=6)
    result = run(settings, out=tmp_path / "run")
    federated = load(settings.data, settings.seed)
    network = build(federated.dataset.task, settings.model, Stream(settings.seed))
    model = {name: value.detach().clone() for name, value in network.named_parameters()}
    for number in (1, 2, 3):
        updates, sizes = [], []
        for client in range(6):
            examples = federated.client(client)[0]
            trained = train_clients(
                network, model, [examples], settings.training, settings.training.learning_rate,
                [Stream(settings.seed, number, client)], classes=10,
            )  # fmt: skip
            updates.append(trained.parameters)
            sizes.append(len(examples))
        model = {
            name: sum(u[name][0].double() * n for u, n in zip(updates, sizes, strict=True)).div(sum(sizes)).float()
            for name in model
        }
    for name, value in result.model.named_parameters():
        torch.testing.assert_close(value, model[name], rtol=1e-4, atol=1e-6)
    scores = evaluate(network, model, federated.dataset.test, "cross_entropy")
    assert result.summary["test_accuracy"] == pytest.approx(scores.accuracy, abs=1 / len(federated.dataset.test))


STATEFUL = [
    {"federation__strategy": "fedadam", "training__schedule": "plateau", "training__schedule_rounds": 1},
    {"federation__strategy": "fedavgm", "training__schedule": "cosine", "training__momentum": 0.9},
    {"federation__strategy": "qfedavg", "evaluation__federated": True, "data__validation_fraction": 0.2},
]


class StopAfter(Display):
    """Presses Ctrl-C after so many clients have replied."""

    def __init__(self, clients: int) -> None:
        super().__init__(None)
        self.left, self.before = clients, 0

    def client_done(self, done: int, total: int) -> None:
        left = self.left
        self.left -= done - self.before
        self.before = done % total
        if left > 0 >= self.left:
            import signal

            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("settings", STATEFUL)
@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("engine", ["batched", "processes", "sequential"])
def test_a_stopped_run_goes_on_to_the_same_bytes(settings, clients, engine, tmp_path) -> None:
    settings = settings | {"engine": engine}
    whole = run(small(**settings), out=tmp_path / "whole")
    with pytest.raises(Interrupted, match="go on with: fedveil resume"):
        run(small(**settings), out=tmp_path / "cut", display=StopAfter(clients))
    resumed = run(small(**settings), resume=tmp_path / "cut")
    assert resumed.summary["model_sha256"] == whole.summary["model_sha256"]
    assert csv(tmp_path / "cut") == csv(tmp_path / "whole")
    for key in ("bytes_up", "bytes_down", "best_round", "rounds"):
        assert resumed.summary[key] == whole.summary[key]


def test_a_finished_run_resumes_to_itself(tmp_path) -> None:
    whole = run(small(), out=tmp_path / "run")
    before = csv(tmp_path / "run")
    assert run(small(), resume=tmp_path / "run").summary == whole.summary
    assert csv(tmp_path / "run") == before


@pytest.mark.plots
def test_the_record_holds_what_the_design_names_and_the_model_in_it_scores_what_it_says(tmp_path) -> None:
    result: Result = run(small(), out=tmp_path / "run")
    names = {path.relative_to(result.run_dir).as_posix() for path in result.run_dir.rglob("*") if path.is_file()}
    assert names == {
        "experiment.toml", "environment.json", "metrics.csv", "clients.csv", "ledger.csv", "model.safetensors",
        "best.safetensors", "checkpoint/state.safetensors", "plots/accuracy.png", "plots/loss.png", "plots/partition.png",
    }  # fmt: skip
    assert result.metrics["round"].tolist() == [0, 1, 2, 3]
    assert result.clients.groupby("round").size().tolist() == [3, 3, 3]
    settings = small()
    federated = load(settings.data, settings.seed)
    network = build(federated.dataset.task, settings.model, Stream(0))
    weights = {k: torch.from_numpy(v) for k, v in load_file(result.run_dir / "model.safetensors").items()}
    scores = evaluate(network, weights, federated.dataset.test, "cross_entropy")
    assert scores.accuracy == result.summary["test_accuracy"] == result.metrics.test_accuracy.iloc[-1]
    assert not result.model.training


def test_the_ledger_counts_every_message_and_adds_up(tmp_path) -> None:
    result = run(small(data__validation_fraction=0.2, evaluation__federated=True), out=tmp_path / "run")
    ledger = pd.read_csv(result.run_dir / "ledger.csv")
    assert len(ledger) == 3 * (3 + 3)
    assert ledger.bytes_up.sum() == result.summary["bytes_up"]
    assert ledger.bytes_down.sum() == result.summary["bytes_down"]
    weights = 4 * sum(p.numel() for p in result.model.parameters())
    trained = ledger[ledger.stage == "train"]
    assert ((trained.bytes_up > weights) & (trained.bytes_up < weights + 1500)).all()
    assert (ledger[ledger.stage == "evaluate"].bytes_up < 500).all()
    assert (ledger.bytes_down > weights).all()


def test_federated_evaluation_adds_up_what_clients_count_on_their_own_part(tmp_path) -> None:
    settings = small(data__validation_fraction=0.25, evaluation__federated=True, evaluation__cohort=6)
    result = run(settings, out=tmp_path / "run")
    federated = load(settings.data, settings.seed)
    network = build(federated.dataset.task, settings.model, Stream(0))
    weights = {name: value.detach() for name, value in result.model.named_parameters()}
    parts = [federated.client(k)[1] for k in range(6)]
    scores = [evaluate(network, weights, part, "cross_entropy") for part in parts]
    correct, examples = sum(s.sums["correct"] for s in scores), sum(s.examples for s in scores)
    assert result.metrics.validation_accuracy.iloc[-1] == pytest.approx(correct / examples)
    last = result.clients[(result.clients["round"] == 3) & (result.clients.stage == "evaluate")]
    np.testing.assert_allclose(last.validation_accuracy, [s.accuracy for s in scores])
    assert last.client.tolist() == list(range(6))


def test_training_stops_at_the_target_or_when_nothing_gets_better(tmp_path) -> None:
    reached = run(small(federation__target_accuracy=0.3, federation__rounds=50), out=tmp_path / "target")
    assert reached.summary["rounds"] < 50
    assert reached.summary["test_accuracy"] >= 0.3
    assert "target accuracy 0.3 reached" in reached.summary["stopped"]
    stale = run(
        small(
            model__initialization="zeros", training__learning_rate=1e-12, federation__patience=2, federation__rounds=50
        ),
        out=tmp_path / "patience",
    )
    assert stale.summary["rounds"] <= 4
    assert "no better accuracy for 2 evaluations" in stale.summary["stopped"]


def test_evaluation_happens_every_so_many_rounds_and_after_the_last(tmp_path) -> None:
    metrics = run(small(evaluation__every=3, federation__rounds=5), out=tmp_path / "run").metrics
    assert metrics[metrics.test_accuracy.notna()]["round"].tolist() == [0, 3, 5]


def test_the_best_model_is_kept_by_validation_where_there_is_one(tmp_path) -> None:
    settings = small(
        data__validation_fraction=0.3, evaluation__federated=True, evaluation__cohort=6, training__learning_rate=1.5
    )
    result = run(settings.override({"federation.rounds": 6}), out=tmp_path / "run")
    rounds = result.metrics[result.metrics["round"] > 0]
    best = rounds["round"][rounds.validation_accuracy.idxmax()]
    assert result.summary["best_round"] == best


def test_divergence_names_client_and_round_and_keeps_what_was_there(tmp_path) -> None:
    settings = small(training__learning_rate=1e30, model__activation="leaky_relu")
    with pytest.raises(TrainingError, match=r"round 1: training diverged: client \d") as caught:
        run(settings, out=tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in kept.values())


def broken_factory(task, settings):
    class Broken(torch.nn.Sequential):
        def forward(self, x):
            if self.training and len(x) == 7:
                raise ValueError("seven examples")
            return super().forward(x)

    return Broken(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_clients_exception_names_the_client(tmp_path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "broken_models", type(sys)("broken_models"))
    sys.modules["broken_models"].factory = broken_factory
    settings = small(model__name="broken_models:factory", training__batch_size=7)
    with pytest.raises(TrainingError, match=r"client \d failed: ValueError: seven examples"):
        run(settings, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data__clients": 2000}, "more clients than"),
        (
            {"model__name": "lstm"},
            "is for classification of text, and the task of the data is classification of images",
        ),
        ({"training__noise": 0.1, "data__dataset": "spam-demo", "model__name": "bag"}, "training.noise"),
        ({"data__min_examples": 1000}, "data.min_examples"),
    ],
)
def test_nothing_is_written_where_settings_and_data_do_not_fit(settings, said, tmp_path) -> None:
    with pytest.raises((SettingsError, DataError), match=said):
        run(small(**settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "strategy", ["fedprox", "fedyogi", "fedadagrad", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"]
)
def test_every_strategy_learns(strategy, tmp_path) -> None:
    settings = small(
        federation__strategy=strategy, federation__cohort=6, federation__rounds=6, training__proximal_mu=0.01,
        training__epochs=2,
    )  # fmt: skip
    metrics = run(settings, out=tmp_path / "run").metrics
    assert metrics.test_accuracy.iloc[-1] > 0.6 > 0.35 > metrics.test_accuracy.iloc[0]


def test_another_run_in_the_same_process_sees_changed_data(tmp_path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 2)).astype(np.float32)
    settings = small(data__dataset="own", data__path=str(tmp_path / "my.npz"), training__epochs=3, federation__rounds=5)
    for number, flip in enumerate((False, True)):
        labels = (features[:, 0] > 0) ^ flip
        np.savez(tmp_path / "my.npz", features=features, labels=np.where(labels, "yes", "no"))
        assert run(settings, out=tmp_path / f"run{number}").summary["test_accuracy"] > 0.9


def test_a_resumed_run_refuses_data_that_changed(tmp_path) -> None:
    features = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    settings = small(data__dataset="own", data__path=str(tmp_path / "my.npz"))
    np.savez(tmp_path / "my.npz", features=features, labels=np.arange(200) % 2)
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "cut", display=StopAfter(4))
    np.savez(tmp_path / "my.npz", features=features + 1, labels=np.arange(200) % 2)
    with pytest.raises(DataError, match="the data is not what it was when the run began"):
        run(settings, resume=tmp_path / "cut")


def test_a_model_that_the_server_makes_infinite_is_not_kept(tmp_path) -> None:
    settings = small(federation__strategy="fedavgm", federation__strategy__learning_rate=1e39)
    with pytest.raises(
        TrainingError, match=r"fedavgm made in round 1 is not finite(.|\n)*federation.strategy.learning_rate"
    ):
        run(settings, out=tmp_path / "run")
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in kept.values())
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 2  # the columns and round 0


def test_clients_with_nothing_to_evaluate_on_are_refused_before_anything_is_written(tmp_path) -> None:
    settings = small(data__clients=1438, data__validation_fraction=0.5, evaluation__federated=True)
    with pytest.raises(SettingsError, match=r"1,438 of 1,438 clients hold one example"):
        run(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stop_while_clients_evaluate_leaves_the_model_of_the_last_whole_round(tmp_path) -> None:
    settings = small(data__validation_fraction=0.2, evaluation__federated=True)
    one = run(settings.override({"federation.rounds": 1}), out=tmp_path / "one")
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "cut", display=StopAfter(3 + 3 + 3 + 1))  # in the evaluation of round 2
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (one.run_dir / "model.safetensors").read_bytes()
    assert pd.read_csv(tmp_path / "cut" / "metrics.csv")["round"].tolist() == [0, 1]
