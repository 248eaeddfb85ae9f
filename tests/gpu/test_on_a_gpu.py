"""What a GPU computes: the CPU's results to rounding, the same bytes each time, whatever happens to the run or its memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kills import content, run_killed

from fedveil.core.errors import TrainingError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.computing import repeatable
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build, example
from fedveil.models.vectorized.batched import batched
from fedveil.simulations.run import resume, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, MIB = torch.device("cuda"), 2**20

IMAGES = {"data.dataset": "benchmarks.data:random_images", "data.dataset.examples": 600, "data.partition": "iid"}
TEXTS = {"data.dataset": "benchmarks.data:random_messages", "data.partition": "iid", "data.vocabulary_size": 4000}
# of each preset: three rounds, on random data of the same shapes where its own must be downloaded
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "spam-demo": {},
    "mnist-mlp": IMAGES,
    "mnist-2nn": IMAGES,
    "mnist-shards": {**IMAGES, "data.partition": "shards"},
    "sms-lstm": {**TEXTS, "data.dataset.examples": 400},
    "sms-mlp": {**TEXTS, "data.dataset.examples": 400},
    "enron-book": {**TEXTS, "data.dataset.examples": 1000, "data.vocabulary_size": 50_000},
    "million": {"federation.cohort": 200},
}
ENOUGH = {"federation.rounds": 3, "evaluation.every": 3, "training.epochs": 1}


def preset(name: str, device: str = "cuda", **settings: Any) -> Experiment:
    changes = {**PRESETS[name], **ENOUGH, "device": device}
    return Experiment.preset(name).override(changes | {key.replace("__", "."): v for key, v in settings.items()})


@pytest.fixture
def memory() -> Iterator[Any]:
    """Limits the GPU's memory for PyTorch, until the end of the test."""

    def limit(mib: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(mib * MIB / torch.cuda.get_device_properties(GPU).total_memory)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_the_same_bytes_twice_and_resumed_and_the_cpus_result_to_rounding(
    name: str, tmp_path: Path
) -> None:
    once, again = (run(preset(name), out=tmp_path / str(i), plots=False) for i in (1, 2))
    assert once.summary["device"] == "cuda"
    assert once.summary["engine"] == "batched"
    assert content(once.run_dir)["metrics.csv"] == content(again.run_dir)["metrics.csv"]
    assert once.summary["model_sha256"] == again.summary["model_sha256"]
    begun = run(preset(name, federation__rounds=2, evaluation__every=3), out=tmp_path / "begun", plots=False)
    assert resume(begun.run_dir, rounds=3).summary["model_sha256"] == once.summary["model_sha256"]
    if name in ("digits", "spam-demo"):  # random labels cannot be learned
        there = run(preset(name, device="cpu", engine="batched"), out=tmp_path / "cpu", plots=False)
        assert once.summary["test_accuracy"] == pytest.approx(there.summary["test_accuracy"], abs=0.02)
    one = [run(preset(name, device=d, engine="batched", federation__rounds=1), out=tmp_path / f"one-{d}", plots=False) for d in ("cpu", "cuda")]  # fmt: skip
    for key, value in one[0].model.state_dict().items():
        torch.testing.assert_close(one[1].model.state_dict()[key], value, rtol=0, atol=1e-2, msg=key)


@pytest.mark.parametrize("name", ["digits", "spam-demo"])
def test_one_after_another_a_preset_repeats_its_bytes_too(name: str, tmp_path: Path) -> None:
    hashes = {
        run(preset(name, engine="sequential"), out=tmp_path / str(i), plots=False).summary["model_sha256"]
        for i in (1, 2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["spam-demo", "digits"])
def test_a_run_that_is_killed_ends_at_the_bytes_of_one_that_is_not(name: str, tmp_path: Path) -> None:
    asked = preset(name, federation__rounds=40, evaluation__every=1)
    whole = run(asked, out=tmp_path / "whole", plots=False)
    found, _ = run_killed(asked, tmp_path, kills=2, seed=1)
    assert found["model_sha256"] == whole.summary["model_sha256"]
    assert content(tmp_path / "run") == content(whole.run_dir)


TASK = Task("features", (6,), ("a", "b", "c"))
TEXT = Task("text", (8,), ("ham", "spam"), vocabulary_size=50)
NETWORKS = {
    "mlp": (TASK, Model(hidden=(7, 5), dropout=0.3, normalization="layer")),
    "prelu": (TASK, Model(hidden=(7,), activation="prelu")),
    "words": (TEXT, Model(name="mlp", embedding=3, hidden=(5,), dropout=0.3)),
    "bag": (TEXT, Model(name="bag", embedding=3)),
    "lstm": (TEXT, Model(name="lstm", embedding=3, units=4, dropout=0.3)),
    "lstm, two layers": (TEXT, Model(name="lstm", embedding=3, units=4, layers=2, pooling="last")),
}
TRAININGS = {
    "sgd": Training(batch_size=4, epochs=2, learning_rate=0.3),
    "momentum": Training(batch_size=3, momentum=0.9, nesterov=True, weight_decay=0.1, max_grad_norm=0.5),
    "adam": Training(batch_size=4, optimizer="adam", learning_rate=0.01, proximal_mu=0.3),
}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_together_and_one_by_one_a_gpu_gives_what_the_cpu_gives(network: str, training: str) -> None:
    """In float64, so that only rounding may differ: dropout, above all, is the same everywhere."""
    task, model = NETWORKS[network]
    rng, sizes = np.random.default_rng(1), [9, 1, 14, 4]
    kind, clients = task.kind, []
    for n in sizes:
        words = rng.integers(1, 30, (n, 8)).astype(np.int32)
        words[np.arange(8) >= rng.integers(1, 9, n)[:, None]] = 0  # padding at the end
        features = words if kind == "text" else rng.random((n, 6))
        clients.append(Examples(features, rng.integers(0, len(task.classes), n)))
    streams = [Stream(7, 3, k) for k in range(len(sizes))]
    found = []
    for device in (torch.device("cpu"), GPU):
        made = build(task, model, Stream(1)).double().to(device)
        probe = example(task).to(device)
        how = batched(made, probe if kind == "text" else probe.double())
        assert not isinstance(how, str)
        for together in (None, how):
            with repeatable(device):
                found.append(
                    train_clients(
                        made, weights.get(made), clients, TRAININGS[training], TRAININGS[training].learning_rate, streams,
                        classes=len(task.classes), together=together,
                    )
                )  # fmt: skip
    for other in found[1:]:
        for name, value in found[0].parameters.items():
            torch.testing.assert_close(other.parameters[name].cpu(), value, rtol=1e-7, atol=1e-8, msg=name)
        np.testing.assert_allclose(other.loss, found[0].loss, rtol=1e-7)


@pytest.mark.parametrize("mib", [500, 300, 120])
def test_where_memory_runs_out_a_run_ends_at_the_same_result_and_repeats_its_bytes(
    mib: int, memory: Any, tmp_path: Path
) -> None:
    asked = preset(
        "mnist-mlp", data__clients=600, data__dataset__examples=60, federation__cohort=600, training__momentum=0.5
    )
    free = run(asked, out=tmp_path / "free", plots=False)
    memory(mib)
    little, again = (run(asked, out=tmp_path / str(i), plots=False) for i in (1, 2))
    lacked = json.loads((little.run_dir / "checkpoint" / "gpu.json").read_text())["lacked"]
    assert lacked
    assert {number for number, _, _ in lacked} == {1}  # later rounds know
    assert little.summary["model_sha256"] == again.summary["model_sha256"]
    for name, value in free.model.state_dict().items():
        torch.testing.assert_close(little.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    memory(8000)
    begun = run(asked.override({"federation.rounds": 1}), out=tmp_path / "begun", plots=False)
    (begun.run_dir / "checkpoint" / "gpu.json").write_text(json.dumps({"memory": 1 << 33, "lacked": lacked}))
    resume(begun.run_dir, rounds=3)


def test_a_data_set_that_does_not_fit_says_so(memory: Any, tmp_path: Path) -> None:
    memory(100)
    with pytest.raises(
        TrainingError, match=r"the data set, whose 60,000 training examples take 0\.2 GB, needs more memory"
    ):
        run(preset("mnist-2nn"), out=tmp_path / "run", plots=False)


def test_a_network_that_does_not_fit_alone_says_so(memory: Any, tmp_path: Path) -> None:
    memory(60)
    with pytest.raises(TrainingError, match="needs more memory than the GPU has free"):
        run(preset("digits", model__hidden=[4000, 4000]), out=tmp_path / "run", plots=False)
