"""The documentation is true: its Python runs, its commands are understood, its links lead somewhere.

`python tests/test_docs.py` writes the tables that follow from the code: settings, and what works under which protection, into
docs/experiments.md, the parameters of protections into docs/privacy.md, mechanisms of noise into docs/differential-privacy.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import noise_tables, prepared
from torch.nn.utils import parameters_to_vector

from fedveil import Experiment, run
from fedveil.core.catalog import STRATEGIES
from fedveil.core.errors import SettingsError
from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.experiment import known_keys
from fedveil.core.settings.keys import choices, values
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic.lattice import Form
from fedveil.privacy.plan import PROFILES, make_lattice, make_plan
from fedveil.privacy.secagg.graph import choose_degree

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
BAR = "\\|"  # a bar within a cell of a table


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def settings_table() -> str:
    """Every setting, its default and its description, as Markdown."""
    defaults = {key: [value] for key, value in values(Experiment()).items()}
    for prefix, kind in choices(Experiment).items():
        for part in kind.table:
            for name, value in kind.table.declared(part, kind.key).settings():
                defaults[f"{prefix}.{name}"] = [*defaults.get(f"{prefix}.{name}", []), value]

    def words(value: object) -> str:
        if value is None or isinstance(value, bool):
            return {None: "", True: "`true`", False: "`false`"}[value]
        return f"`{list(value) if isinstance(value, tuple) else value}`"

    rows = [
        f"| `{key}` | {', '.join(dict.fromkeys(map(words, defaults[key])))} | {text.replace('|', BAR)} |"
        for key, text in known_keys().items()
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows]) + "\n"


def plan_table() -> str:
    """Grid, largest cohort and rounding of every profile at three cohorts."""
    rows = []
    for protection, name in [*((scheme, name) for name, (scheme, *_) in PROFILES.items()), ("secagg", None)]:
        profile = {"profile": name} if name else {}
        for cohort in (10, 100, 1000):
            try:
                plan = make_plan(Privacy(protection=ProtectionChoice(protection, **profile)), cohort)
            except SettingsError:
                rows.append(f"| `{name}` | {cohort:,} | | refused | | | |")
                continue
            scale = f"2^{plan.scale_bits}" if plan.scale_bits else ""
            rows.append(
                f"| `{name or protection}` | {cohort:,} | {scale} | 2^-{plan.grid.bits} | {plan.clients:,} | "
                f"{plan.rounding * cohort:.1e} | {plan.grid.most:,} |"
            )
    head = "| profile | cohort K | scale | grid | most clients | rounding of the mean, at most | most examples of a cohort |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows]) + "\n"


def size_table() -> str:
    """Bytes a parameter on the wire, of a million parameters."""
    rows = []
    for profile, (protection, *_) in PROFILES.items():
        lattice, size = make_lattice(Privacy(protection=ProtectionChoice(protection, profile=profile))), 1_000_000
        forms = {True: Form(lattice, size, True), False: Form(lattice, size, protection == "bfv")}
        cells = [f"{form.bytes(seeded) / size:.2f}" for way, form in forms.items() for seeded in (way, False)]
        rows.append(f"| `{profile}` | {protection} | {' | '.join(cells)} |")
    head = "| profile | | upload | download | upload, public API alone | download, public API alone |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"


def graph_table() -> str:
    """Neighbours and threshold of secure aggregation with the default shares."""
    rows = []
    for clients in (3, 4, 5, 10, 20, 50, 100, 200, 500, 1000):
        passive, active = (choose_degree(clients, 0.2, 0.2, lying) for lying in (False, True))
        few = clients // 5
        rows.append(f"| {clients:,} | {few} | {few} | {passive[0]} | {passive[1]} | {active[0]} | {active[1]} |")
    head = "| cohort | may drop out | may collude | neighbours | threshold | neighbours, server may lie | threshold |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows]) + "\n"


def strategies_table() -> str:
    """Which strategies run under which protection, as the settings are refused or not; those alike in a row."""
    rows: dict[tuple[bool, ...], list[str]] = {}
    for name in STRATEGIES:
        rows.setdefault(tuple(_works(name, protection) for protection in ("ckks", "bfv", "secagg")), []).append(name)
    lines = [
        f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join('yes' if mark else 'no' for mark in marks)} |"
        for marks, names in rows.items()
    ]
    head = "| strategy | with `ckks` | with `bfv` | with `secagg` |"
    return "\n".join([head, "|---|---|---|---|", *lines]) + "\n"


def _works(strategy: str, protection: str) -> bool:
    settings = {"federation.strategy": strategy, "privacy.protection": protection}
    if strategy == "fedprox":
        settings["training.proximal_mu"] = 0.1
    try:
        Experiment.preset("digits").override(settings)
    except SettingsError:
        return False
    return True


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("experiments.md", settings_table),
    "strategies": ("experiments.md", strategies_table),
    "plans": ("privacy.md", plan_table),
    "sizes": ("privacy.md", size_table),
    "graph": ("privacy.md", graph_table),
    "odds": ("differential-privacy.md", noise_tables.odds_table),
    "mechanisms": ("differential-privacy.md", noise_tables.mechanisms_table),
    "sampling": ("differential-privacy.md", noise_tables.sampling_table),
    "refusals": ("differential-privacy.md", noise_tables.refusals_table),
}
PYTHON = [(page.name, code) for page in PAGES for code in blocks(page, "python")]
COMMANDS = sorted({
    line.split("#")[0].strip()
    for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("fedveil")
})  # fmt: skip


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_in_the_documentation_runs(page, code, tmp_path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, f"{page}\n{code}\n{answer.stderr}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documentation_are_understood(command, tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(Experiment.preset("digits").toml())
    for name in ("my_networks.py", "my_strategies.py"):
        (tmp_path / name).write_text(next(code for _, code in PYTHON if f"# {name}" in code))
    words = shlex.split(command.split(">")[0])
    if words[1] == "run":
        words.append("--show")  # settings are resolved and checked; whole runs are tested elsewhere
    elif words[1] in ("resume", "app", "submit", "data") or words[1:3] in (["keys", "show"], ["keys", "open"]):
        words.append("--help")
    answer = prepared.fedveil(*words[1:], cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr


def test_the_example_of_a_users_own_network_trains(tmp_path) -> None:
    (code,) = [code for page, code in PYTHON if "# my_networks.py" in code]
    (tmp_path / "my_networks.py").write_text(code)
    words = ["run", "digits", "--set", "model.name=my_networks:cnn", "--set", "federation.rounds=2", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = prepared.fedveil(*words, cwd=tmp_path, environment=environment)
    assert answer.returncode == 0, answer.stderr


def test_the_example_of_a_users_own_strategy_trains_and_tells(tmp_path, monkeypatch) -> None:
    (code,) = [code for page, code in PYTHON if "# my_strategies.py" in code]
    (tmp_path / "my_strategies.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = {"federation.strategy": "my_strategies:Cautious", "federation.rounds": 2}
    result = run(Experiment.preset("digits").override(chosen), out=tmp_path / "run", plots=False)
    losses = result.clients[result.clients.stage == "train"].groupby("round").train_loss
    spread = (losses.max() - losses.min()).to_numpy()
    np.testing.assert_allclose(result.metrics.train_loss_spread[1:], spread)
    np.testing.assert_allclose(result.metrics.train_share[1:], 1 / (1 + spread))
    plain = run(Experiment.preset("digits").override({"federation.rounds": 1}), out=tmp_path / "plain", plots=False)
    assert result.metrics.test_loss[0] > result.metrics.test_loss[1] > plain.metrics.test_loss[1]  # it moved by a share


def test_the_example_of_a_users_own_metric_is_told(tmp_path) -> None:
    (code,) = [code for page, code in PYTHON if "# my_metrics.py" in code]
    (tmp_path / "my_metrics.py").write_text(code)
    words = [
        "run",
        "digits",
        "--set",
        'evaluation.metrics=["my_metrics:top3"]',
        "--set",
        "federation.rounds=2",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = prepared.fedveil(*words, cwd=tmp_path, environment=environment)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["test_accuracy"] < told["test_top3"] <= 1


@pytest.mark.parametrize("protection", ["ckks", "bfv"])
def test_a_sealed_model_opens_with_tenseal_alone_as_the_documentation_says(protection, tmp_path) -> None:
    (code,) = [code for page, code in PYTHON if "# open_sealed.py" in code]
    settings = {"privacy.protection": protection, "federation.rounds": 2, "engine": "sequential"}
    result = run(Experiment.preset("digits").override(settings), out=tmp_path / "run")
    (tmp_path / "open_sealed.py").write_text(code)
    reader = (
        "import sys, numpy, open_sealed\n"
        "numpy.save('opened.npy', open_sealed.weights('run/model.sealed', 'run/keys/client-1/client.key'))\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'fedveil']\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", reader], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    written = parameters_to_vector(result.model.parameters()).detach().numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "opened.npy"), written)


def test_experiments_in_the_documentation_are_understood() -> None:
    found = [tomllib.loads(block) for page in PAGES for block in blocks(page, "toml")]
    assert len(found) >= 2
    for config in found:
        Experiment.parse(config["experiment"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_code_says(name) -> None:
    page, table = TABLES[name]
    assert _marked(name, table()) in (CHECKOUT / "docs" / page).read_text(), "run: python tests/test_docs.py"


def test_every_strategy_works_in_the_clear() -> None:
    assert [name for name in STRATEGIES if not _works(name, "none")] == []


def test_every_setting_is_described() -> None:
    assert all(known_keys().values())


def _marked(name: str, table: str) -> str:
    return f"<!-- {name} -->\n{table}<!-- end of {name} -->\n"


if __name__ == "__main__":
    for name, (page, table) in TABLES.items():
        path = CHECKOUT / "docs" / page
        before, _, rest = path.read_text().partition(f"<!-- {name} -->\n")
        path.write_text(before + _marked(name, table()) + rest.partition(f"<!-- end of {name} -->\n")[2])
