"""A task of next tokens from end to end: a data set and a network of one's own, trained, evaluated, resumed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from torch import nn

from fedveil import DataError, Experiment, SettingsError, run
from fedveil.core.declaration import part
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import load
from fedveil.models.local.evaluation import evaluate
from fedveil.models.networks.build import build
from fedveil.models.networks.words import Words
from fedveil.simulations.attacks.lab.trials import Bench
from fedveil.simulations.display import Display, describe

V, T = 13, 7
TASK = Task("text", (T,), (), V, "next_token")


def counting(n: int, seed: int) -> Examples:
    """Texts that count on from a random word, of random lengths: the next token is known, but for the first."""
    rng = np.random.default_rng(seed)
    words = (rng.integers(0, V - 1, (n, 1)) + np.arange(T + 1)) % (V - 1) + 1  # [n, t + 1]
    mask = np.arange(T) < rng.integers(2, T + 1, n)[:, None]
    return Examples(np.where(mask, words[:, :-1], 0).astype(np.int32), np.where(mask, words[:, 1:], 0), mask)


@part(tasks=("next_token",))
def texts(data: object) -> DataSet:
    return DataSet("counting", TASK, counting(120, 0), counting(40, 1), made_up=True)


@part(tasks=("next_token",))
def network(task: Task, settings: object) -> nn.Module:
    return nn.Sequential(Words(task.vocabulary_size, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, task.labels))


class Own(nn.Module):
    """The same, without layer rules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network(TASK, None)

    def forward(self, ids):
        return self.layers(ids)


def functional(task: Task, settings: object) -> nn.Module:
    return Own()


def of_one_vector(task: Task, settings: object) -> nn.Module:
    return nn.Sequential(Words(V, 8), nn.Flatten(), nn.Linear(8 * T, V))


def tokens_told(outputs, examples) -> dict[str, float]:
    return {"total": examples.mask.sum(), "count": len(examples)}


@pytest.fixture
def experiment(monkeypatch):
    """Settings with parts of this module, by names that can be imported."""
    import sys
    from types import ModuleType

    own = ModuleType("own_language")
    for found in (texts, network, functional, of_one_vector, tokens_told):
        setattr(own, found.__name__, found)
    monkeypatch.setitem(sys.modules, "own_language", own)
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])

    def settings(**changed) -> Experiment:
        base = {
            "data.dataset": "own_language:texts",
            "data.clients": 6,
            "data.partition": "quantity",
            "data.validation_fraction": 0.25,
            "model.name": "own_language:network",
            "training.batch_size": 4,
            "training.learning_rate": 0.5,
            "federation.rounds": 3,
            "federation.cohort": 4,
            "evaluation.federated": True,
            "evaluation.cohort": 6,
        }
        return Experiment().override(base | {key.replace("__", "."): value for key, value in changed.items()})

    return settings


@pytest.mark.parametrize("name", ["network", "functional"])
def test_engines_agree_and_learn_and_clients_scores_add_up_to_those_of_all_their_tokens(
    experiment, tmp_path, name
) -> None:
    settings = experiment(model__name=f"own_language:{name}", evaluation__metrics=["own_language:tokens_told"])
    runs = {
        engine: run(settings.override({"engine": engine}), out=tmp_path / engine)
        for engine in ("batched", "sequential")
    }
    metrics = runs["sequential"].metrics
    scores = ["loss", "accuracy", "perplexity", "tokens_told"]
    columns = [f"{where}_{score}" for where in ("test", "validation") for score in scores]
    assert [column for column in metrics if column.startswith(("test_", "validation_"))] == columns
    for other in runs.values():
        pd.testing.assert_frame_equal(other.metrics, metrics, rtol=1e-4)
    np.testing.assert_allclose(metrics.test_perplexity, np.exp(metrics.test_loss))
    assert metrics.test_perplexity.iloc[0] > 10
    assert metrics.test_perplexity.iloc[-1] < 0.7 * metrics.test_perplexity.iloc[0]

    federated = load(settings.data, settings.seed)
    trained = {name: value.detach() for name, value in runs["sequential"].model.named_parameters()}
    parts = [federated.client(k)[1] for k in range(6)]
    whole = Examples(*(np.concatenate(arrays) for arrays in zip(*((p.features, p.labels, p.mask) for p in parts), strict=True)))  # fmt: skip
    pooled = evaluate(build(TASK, settings.model, Stream(0)), trained, whole, "cross_entropy")
    last = metrics.iloc[-1]
    assert last.validation_accuracy == pooled.accuracy
    assert last.validation_loss == pytest.approx(pooled.loss, rel=1e-6)
    assert last.validation_tokens_told == pooled.predictions / len(whole)
    told = runs["sequential"].clients.query("stage == 'evaluate' and round == 3")
    assert told.examples.tolist() == [len(held) for held in parts]


def test_a_run_repeats_to_the_byte(experiment, tmp_path) -> None:
    settings = experiment(engine="batched")
    whole = run(settings, out=tmp_path / "whole")
    again = run(settings, out=tmp_path / "again")
    assert again.summary["model_sha256"] == whole.summary["model_sha256"]
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model__name": "mlp"}, "model.name = 'mlp': is for classification, and the task of the data is next_token of text"),
        ({"data__partition": "shards"}, "data.partition = 'shards': is for classification, and the task of data.dataset = 'own_language:texts' is next_token of text; take 'iid' or 'quantity' or 'natural'"),
        ({"model__name": "own_language:of_one_vector"}, "for two examples the network gives float32 [2, 13]; it must give logits, float [2, 7, 13], for the 13 word ids"),
        ({"evaluation__metrics": ["auc"]}, "evaluation.metrics: 'auc': is for binary classification"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_task_is_refused_with_the_names_of_both(experiment, tmp_path, changed, words) -> None:
    with pytest.raises(SettingsError) as refused:
        run(experiment(**changed), out=tmp_path / "run")
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_attacks_on_labels_and_words_of_a_classification_refuse_it(experiment) -> None:
    with pytest.raises(
        SettingsError, match=r"an attack: is for classification, and the task of .* is next_token of text"
    ):
        Bench.of(experiment())


def test_before_a_run_the_data_are_described_by_their_vocabulary(experiment) -> None:
    from fedveil.server.federation import prepare, resolve

    said = describe(prepare(resolve(experiment())), "x")
    assert "120 training and 40 test examples, next of 13 word ids; quantity over 6 clients" in said
    assert Display(None) is not None


HELD = counting(30, 2)
BROKEN = {
    "no mask": (dataclasses.replace(HELD, mask=None), TASK, "train has no mask, which says for next_token of text"),
    "mask of another kind": (dataclasses.replace(HELD, mask=HELD.labels), TASK, "train mask is int64 (30, 7), it must be bool"),
    "nothing counts": (dataclasses.replace(HELD, mask=HELD.mask & (np.arange(30) > 3)[:, None]), TASK, "train has 4 examples in which no position counts"),
    "a label an example": (dataclasses.replace(HELD, labels=HELD.labels[:, 0]), TASK, "train labels have shape (30,), next_token of text has (n, 7)"),
    "a word too many": (dataclasses.replace(HELD, labels=HELD.labels + 1), TASK, "train labels are 1 to 13, its word ids 0 to 12"),
    "classes": (HELD, dataclasses.replace(TASK, classes=("a", "b")), "next_token is of text, and has no classes"),
    "another task": (HELD, Task("text", (T,), ("a", "b"), V), "its loader is declared for next_token, and its task is classification of text"),
}  # fmt: skip


@pytest.mark.parametrize("broken", list(BROKEN))
def test_a_data_set_whose_labels_or_masks_are_not_those_of_its_task_is_refused(experiment, monkeypatch, broken) -> None:
    import sys

    train, task, words = BROKEN[broken]
    loader = part(tasks=("next_token",))(lambda data: DataSet("broken", task, train, HELD))
    monkeypatch.setattr(sys.modules["own_language"], "broken", loader, raising=False)
    with pytest.raises(DataError) as refused:
        load(experiment(data__dataset="own_language:broken", data__path=str(sorted(BROKEN).index(broken))).data, 0)
    assert words in str(refused.value)
