"""Parts from outside the package, one file each: described, checked, explained and run as FedVeil's own are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fedveil import Experiment, SettingsError, run
from fedveil.core.catalog import DATASETS, DEFENCES, MODELS, PARTITIONS, Table
from fedveil.core.settings.keys import describe

FILES = {
    "my_partition": '''
"""Clients that take turns."""

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.settings.section import Count, Section
from fedveil.datasets.partition.division import Partition


class Turns(Section):
    block: Count = Field(4, description="examples a turn")


@part(Turns)
def turns(pool, settings, rng):
    """Deal out blocks of neighbours in turns."""
    return Partition.of(np.arange(len(pool)) // settings.block % pool.clients, pool.clients)
''',
    "my_network": '''
"""A convolution before the classes."""

from typing import Annotated

from pydantic import Field
from torch import nn

from fedveil.core.declaration import part
from fedveil.core.settings.section import Count, Section


class Cnn(Section):
    channels: Annotated[tuple[Count, ...], Field(strict=False)] = Field((2,), description="of each convolution")


@part(Cnn)
def cnn(task, settings):
    """Convolutions of 3 x 3, and a linear layer."""
    sizes = [task.shape[0], *settings.channels]
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * task.shape[1] * task.shape[2], len(task.classes)))
''',
    "my_data": '''
"""Half of the digits."""

from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.settings.section import Count, Section
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.published.images import digits


class Every(Section):
    step: Count = Field(2, description="one example in so many is taken")


@part(Every, uses=("test_fraction",))
def some_digits(data):
    """Some of the digits that scikit-learn has."""
    import numpy as np

    made, settings = digits(data), data.dataset.settings
    kept = np.arange(0, len(made.train), settings.step)
    return DataSet("some digits", made.task, made.train.take(kept), made.test)
''',
    "my_defence": '''
"""Rounding."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.settings.section import Section


class Round(Section):
    decimals: Annotated[int, Field(ge=0, le=9)] = Field(2, description="that are kept of each number")


@part(Round)
def rounded(update, settings, generator):
    """Round each number of an update."""
    return {name: np.round(value, settings.decimals) for name, value in update.items()}
''',
}
# table, the setting that names the part, what its settings start with, the part, a setting, a wrong spelling, a value
PARTS = [
    (PARTITIONS, "data.partition", "data.partition", "my_partition:turns", "block", "blok", 7),
    (MODELS, "model.name", "model", "my_network:cnn", "channels", "chanels", (3, 2)),
    (DATASETS, "data.dataset", "data.dataset", "my_data:some_digits", "step", "stp", 3),
    (DEFENCES, "privacy.defence", "privacy.defence", "my_defence:rounded", "decimals", "decimal", 4),
]
QUICK = {
    "federation.rounds": 1,
    "federation.cohort": 3,
    "data.clients": 4,
    "training.epochs": 1,
    "training.learning_rate": 0.1,  # without an activation, the network diverges at the preset's
    "engine": "sequential",
}


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a file for each part."""
    for name, code in FILES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    ("table", "key", "prefix", "name", "setting", "wrong", "value"), PARTS, ids=lambda v: str(v)[:20]
)
def test_a_part_from_outside_is_as_a_built_in_one(
    table: Table, key: str, prefix: str, name: str, setting: str, wrong: str, value: object, outside: Path
) -> None:
    text = describe(table, name, key)
    assert text.startswith(f"{name}  ")
    assert f"  {setting} = " in text
    experiment = Experiment.preset("digits").override({**QUICK, f"{prefix}.{setting}": value, key: name})
    if key == "model.name":
        assert experiment.model.dump() == {"name": name, setting: value}
    assert Experiment.parse(experiment.toml()) == experiment
    with pytest.raises(SettingsError, match=rf"{prefix}\.{wrong}: .* did you mean '{prefix}\.{setting}'"):
        experiment.override({f"{prefix}.{wrong}": value})
    with pytest.raises(SettingsError, match=rf"{prefix}\.{setting} = 'x'"):
        experiment.override({f"{prefix}.{setting}": "x"})
    first = run(experiment, out=outside / "run", plots=False).summary
    assert first["model_sha256"] == run(experiment, out=outside / "again", plots=False).summary["model_sha256"]
    other = run(experiment.override({f"{prefix}.{setting}": None}), out=outside / "other", plots=False).summary
    assert first["model_sha256"] != other["model_sha256"]  # the setting has an effect
    assert (outside / "run" / "experiment.toml").read_text() == experiment.toml().replace(
        'device = "auto"', 'device = "cpu"'
    )


def test_all_four_work_together_on_every_engine(outside: Path) -> None:
    settings = {key: name for _, key, _, name, *_ in PARTS}
    found = {
        engine: run(
            Experiment.preset("digits").override({**QUICK, **settings, "engine": engine}),
            out=outside / engine,
            plots=False,
        ).summary["test_accuracy"]
        for engine in ("sequential", "batched", "processes")
    }
    assert found["sequential"] == found["processes"] == pytest.approx(found["batched"], abs=0.02)


def test_a_part_that_only_the_sender_has_is_not_imported_by_who_receives_it(outside: Path) -> None:
    (outside / "harmful.py").write_text("from pathlib import Path\nPath('ran').write_text('x')\n")
    text = (
        'model.name = "harmful:network"\nmodel.depth = 3\nprivacy.defence = "harmful:defence"\n'
        '[data]\npartition = {name = "harmful:partition", a = 1}\ndataset = "harmful:data"\n'
        '[federation]\nstrategy = "harmful:strategy"\n'
    )
    experiment = Experiment.received(text)
    assert (experiment.model.name, experiment.data.partition.dump()["a"]) == ("harmful:network", 1)
    assert Experiment.received(experiment.toml()) == experiment
    hidden = Experiment.received(text.replace("[data]", 'privacy.protection = "secagg"\n[data]'))
    assert hidden.privacy.protected
    assert "harmful" not in sys.modules


def test_an_own_part_that_takes_other_arguments_says_how_it_is_called(outside: Path) -> None:
    (outside / "old_partition.py").write_text(
        "def halves(labels, clients, rng, data, groups, names):\n    return None\n"
    )
    experiment = Experiment.preset("digits").override({"data.partition": "old_partition:halves"})
    with pytest.raises(SettingsError, match=r"'old_partition:halves': failed .* called as \(pool, settings, rng\)"):
        run(experiment, out=outside / "run")
