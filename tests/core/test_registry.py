"""Names: every part that is listed can be loaded, and listing loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedveil.core import parts
from fedveil.core.errors import SettingsError
from fedveil.core.registry import Table

LOADABLE = [parts.DATASETS, parts.PARTITIONS, parts.MODELS, parts.STRATEGIES]


@pytest.mark.parametrize(
    ("table", "name"), [(t, n) for t in LOADABLE for n in t], ids=lambda v: v if isinstance(v, str) else v.kind
)
def test_every_listed_part_loads_and_is_described(table: Table, name: str) -> None:
    assert callable(table.load(name, "key"))
    assert table[name].strip()


def test_a_users_own_part_is_named_by_module_and_object() -> None:
    import math

    assert parts.MODELS.load("math:sqrt", "model.name") is math.sqrt
    for bad in ("math:nothing", "no.such.module:x", ":x"):
        with pytest.raises(SettingsError, match="cannot be loaded"):
            parts.MODELS.load(bad, "model.name")


def test_listing_names_and_checking_settings_imports_nothing_heavy() -> None:
    code = (
        "import sys, fedveil, fedveil.cli\nfrom fedveil import Experiment\nExperiment.preset('digits').toml()\n"
        "print([m for m in ('torch', 'flwr', 'pandas', 'sklearn', 'matplotlib', 'scipy', 'PIL') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_public_names_are_exactly_the_promised_ones() -> None:
    import fedveil

    assert set(fedveil.__all__) == {
        "DataError", "Experiment", "FedveilError", "Interrupted", "Result", "SettingsError", "TrainingError", "__version__", "resume", "run",
    }  # fmt: skip
    assert all(getattr(fedveil, name) is not None for name in fedveil.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedveil.nothing
