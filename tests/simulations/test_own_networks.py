"""A network of a user's own: what it keeps beside its weights travels with the model's file, or is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn

from fedveil import Experiment, SettingsError, run
from fedveil.core.errors import DataError, TrainingError

SMALL = {"data.clients": 4, "training.epochs": 1, "federation.cohort": 3, "federation.rounds": 2}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_own_networks", sys.modules[__name__])


def small(network: str, **settings: Any) -> Experiment:
    return Experiment.preset("digits").override({**SMALL, **settings, "model.name": f"tests_own_networks:{network}"})


class RandomFeatures(nn.Module):
    """A projection that is drawn once and never trained, by NumPy, and one that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.from_numpy(np.random.standard_normal((64, 32))).float())
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.cos(self.get_buffer("scale") * x.flatten(1) @ self.get_buffer("projection")))
        return logits


def random_features(task: Any, settings: Any) -> nn.Module:
    return RandomFeatures()


def normalised(task: Any, settings: Any) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def running(task: Any, settings: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))


def squeezing(task: Any, settings: Any) -> nn.Module:
    class Squeezing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    return Squeezing(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("protection", ["none", "ckks"])
def test_the_models_file_alone_fills_the_network_of_a_user(protection: str, tmp_path: Path) -> None:
    settings = {"privacy.protection": protection} if protection != "none" else {}
    result = run(small("random_features", **settings), out=tmp_path / "run", plots=False)
    bare = RandomFeatures()
    bare.load_state_dict(load_tensors(tmp_path / "run" / "model.safetensors"))  # strict: no name too few, none too many
    inputs = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(bare(inputs), result.model(inputs))
    assert not torch.equal(bare.get_buffer("projection"), RandomFeatures().get_buffer("projection"))


def test_a_run_starts_from_such_a_file_with_its_seed_alone(tmp_path: Path) -> None:
    run(small("random_features"), out=tmp_path / "run", plots=False)
    start = load_file(tmp_path / "run" / "model.safetensors")
    again = run(small("random_features"), out=tmp_path / "again", start=start, plots=False)
    assert again.metrics.test_loss[0] == pytest.approx(
        run(small("random_features"), resume=tmp_path / "run").metrics.test_loss[2]
    )
    with pytest.raises(DataError, match=r"trained with another 'projection'.*use the seed"):
        run(small("random_features", seed=9), out=tmp_path / "other", start=start)
    assert not (tmp_path / "other").exists()


def test_batch_norm_of_each_batch_alone_is_trained(tmp_path: Path) -> None:
    settings = {"training.batch_size": "full", "training.learning_rate": 0.3, "federation.rounds": 6}
    result = run(small("normalised", **settings), out=tmp_path / "run", plots=False)
    assert result.metrics.test_accuracy.iloc[-1] > 0.6
    with pytest.raises(TrainingError, match=r"client \d: a batch of one example, which the network cannot compute"):
        run(small("normalised", **{"training.batch_size": 1}), out=tmp_path / "one", plots=False)


@pytest.mark.parametrize(
    ("network", "said"), [("running", "'1' keeps statistics"), ("squeezing", "for a batch of one example")]
)
def test_what_cannot_work_is_refused_before_a_record_is_made(network: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        run(small(network), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
