"""Adding a part costs little: the examples of CONTRIBUTING.md work as they stand, from outside the package and inside it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedveil import Experiment, Result, SettingsError, run
from fedveil.core.catalog import ATTACKS, DATASETS, DEFENCES, MODELS, PARTITIONS, STRATEGIES, Table
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import AttackChoice
from fedveil.core.settings.experiment import parse_assignments
from fedveil.core.settings.keys import describe
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.simulations.attacks import run as attack

CHECKOUT = Path(__file__).parents[1]
PAGE = (CHECKOUT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n# ([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = {name: f"# {name}\n{code}" for name, code in BLOCKS if name.endswith(".py")}
LINES = {name.rpartition(" ")[2]: line for name, line in BLOCKS if name.startswith("core/catalog.py")}
SMALL = [
    "federation.rounds=1", "federation.cohort=4", "data.clients=6", "training.epochs=1", "model.hidden=[8]", "engine=batched", "workers=1",
]  # fmt: skip


@dataclass(frozen=True)
class Added:
    """A part that CONTRIBUTING.md shows.

    key: the setting that names it; prefix: of its own settings
    setting, wrong, value: one of its settings, a misspelling of it, and a value that is not the default
    """

    table: Table
    key: str
    prefix: str
    part: str
    setting: str
    wrong: str
    value: str


ADDED = [
    Added(
        STRATEGIES, "federation.strategy", "federation.strategy", "my_rules:clipped_mean", "longest", "longst", "0.1"
    ),
    Added(
        STRATEGIES,
        "federation.strategy",
        "federation.strategy",
        "my_algorithms:fedlion",
        "learning_rate",
        "learn_rate",
        "0.02",
    ),
    Added(DEFENCES, "privacy.defence", "privacy.defence", "my_transforms:random_mask", "kept", "keep", "0.1"),
    Added(PARTITIONS, "data.partition", "data.partition", "my_partitions:geometric", "ratio", "ration", "0.5"),
    Added(MODELS, "model.name", "model", "my_networks:residual", "depth", "depht", "1"),
    Added(DATASETS, "data.dataset", "data.dataset", "my_data:rings", "noise", "noises", "0.3"),
]


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the examples, one file each."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code, "utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def digits(*assignments: str) -> Experiment:
    """The digits with changes, as `--set` says them; a network of one's own has no `model.hidden`."""
    given = [word for word in SMALL if not (word.startswith("model.") and any("model.name" in a for a in assignments))]
    return Experiment.preset("digits").override(parse_assignments([*given, *assignments]))


def trained(folder: Path, *assignments: str, **more: Any) -> Result:
    return run(digits(*assignments), out=folder, plots=False, **more)


def first_model(experiment: Experiment) -> dict[str, np.ndarray]:
    """The weights that the seed gives."""
    task = load(experiment.data, experiment.seed).dataset.task
    return to_numpy(get(build(task, experiment.model, Stream(experiment.seed))))


def moves(result: Result, *assignments: str) -> dict[str, np.ndarray]:
    """How far the model moved, by name."""
    start = first_model(digits(*assignments))
    return {name: value - start[name] for name, value in load_file(result.run_dir / "model.safetensors").items()}


def test_the_page_has_an_example_of_each_kind() -> None:
    kinds = re.findall(r"^### (?:A|An) (.*)$", PAGE, re.MULTILINE)
    assert len(kinds) == len(EXAMPLES) == 9
    assert set(EXAMPLES) == {f"{added.part.partition(':')[0]}.py" for added in ADDED} | {
        "my_attacks.py", "my_adversaries.py", "my_metrics.py",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_keeps_the_rules_of_the_house(name: str, outside: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        answer = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(CHECKOUT / "pyproject.toml"), name],
            cwd=outside, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("added", ADDED, ids=lambda added: added.part)
def test_a_part_is_run_set_checked_and_explained_from_outside(added: Added, outside: Path) -> None:
    text = describe(added.table, added.part, added.key)
    assert re.match(rf"{added.part}  \w.*\n  ", text)
    assert f"  {added.setting} = " in text
    chosen, own = f"{added.key}={added.part}", f"{added.prefix}.{added.setting}"
    experiment = digits(chosen, f"{own}={added.value}")
    assert Experiment.parse(experiment.toml()) == experiment
    with pytest.raises(SettingsError, match=rf"{added.prefix}\.{added.wrong}: unknown .* did you mean '{own}'"):
        digits(chosen, f"{added.prefix}.{added.wrong}={added.value}")
    with pytest.raises(SettingsError, match=rf"{own} = 'x': must be a"):
        digits(chosen, f"{own}=x")
    results = [
        trained(outside / "a", chosen, f"{own}={added.value}"),
        trained(outside / "b", chosen, f"{own}={added.value}"),
        trained(outside / "c", chosen),
        trained(outside / "d"),
    ]
    same, again, default, without = (result.summary["model_sha256"] for result in results)
    assert same == again
    assert len({same, default, without}) == 3  # the part, and its setting, have an effect


@pytest.mark.parametrize(
    ("kind", "name"),
    [("strategies", "my_rules:clipped_mean"), ("attacks", "my_attacks:risen_classes"), ("metrics", "my_metrics:confidence")],
)  # fmt: skip
def test_a_part_is_shown_from_outside(kind: str, name: str) -> None:
    from fedveil.cli import app

    answer = CliRunner().invoke(app, ["show", kind, name], catch_exceptions=False)
    assert answer.exit_code == 0
    assert answer.output.startswith(f"{name}  ")
    wanted = {"strategies": "longest", "attacks": "share", "metrics": "no settings of its own"}[kind]
    assert wanted in answer.output


@pytest.mark.parametrize("longest", [0.05, 0.5])
def test_the_rule_moves_the_model_no_further_than_its_setting(longest: float, outside: Path) -> None:
    chosen = ["federation.strategy=my_rules:clipped_mean", f"federation.strategy.longest={longest}"]
    moved = moves(trained(outside / "run", *chosen), *chosen)
    length = float(np.sqrt(sum(np.sum(value.astype(np.float64) ** 2) for value in moved.values())))
    assert 0.3 * longest < length <= longest * 1.0001


def test_the_algorithm_moves_each_weight_by_its_rate_and_works_where_only_the_mean_is_seen(outside: Path) -> None:
    chosen = [
        "federation.strategy=my_algorithms:fedlion", "federation.strategy.learning_rate=0.02", "privacy.protection=secagg",
    ]  # fmt: skip
    moved = moves(trained(outside / "run", *chosen), *chosen)
    steps = np.unique(np.concatenate([np.round(np.abs(value), 5).ravel() for value in moved.values()]))
    assert set(steps.tolist()) <= {0.0, np.float32(0.02).round(5).item()}
    with pytest.raises(SettingsError, match="computes with the mean of the weights"):
        digits(chosen[0], "privacy.protection=ckks")


def test_the_algorithm_keeps_its_momentum_over_a_resume(outside: Path) -> None:
    from fedveil.simulations.run import resume

    chosen = ["federation.strategy=my_algorithms:fedlion"]
    whole = trained(outside / "whole", *chosen, "federation.rounds=3")
    trained(outside / "half", *chosen, "federation.rounds=2")
    assert resume(outside / "half", rounds=3).summary["model_sha256"] == whole.summary["model_sha256"]


def test_the_transform_sends_the_share_it_says_and_keeps_the_mean() -> None:
    transforms, rng = module("my_transforms"), np.random.default_rng(0)
    update = {"weight": rng.standard_normal((20, 10)), "bias": rng.standard_normal(10)}
    settings = transforms.RandomMask(kept=0.25)
    masked = [transforms.random_mask(update, settings, rng) for _ in range(4000)]
    assert np.mean([one["weight"] != 0 for one in masked]) == pytest.approx(0.25, abs=0.005)
    for name, value in update.items():
        np.testing.assert_allclose(np.mean([one[name] for one in masked], axis=0), value, atol=0.15)


@pytest.mark.parametrize(("clients", "ratio"), [(7, 0.5), (100, 0.9), (3, 1.0)])
def test_the_partition_gives_everything_away_in_the_sizes_it_says(clients: int, ratio: float) -> None:
    chosen = ["data.partition=my_partitions:geometric", f"data.partition.ratio={ratio}", f"data.clients={clients}"]
    federated = load(digits(*chosen, "federation.cohort=3").data, 0)
    sizes = federated.holdings.sizes(np.arange(clients))
    assert sizes.sum() == len(federated.dataset.train)
    assert (np.diff(sizes) <= 0).all()
    assert sizes[1] / sizes[0] == pytest.approx(ratio, rel=0.05)


def test_the_network_learns_and_refuses_a_task_that_it_does_not_fit(outside: Path) -> None:
    chosen = ["model.name=my_networks:residual", "model.depth=3"]
    assert trained(outside / "run", *chosen, "federation.rounds=10").summary["test_accuracy"] > 0.85
    with pytest.raises(SettingsError, match=r"my_networks:residual.* is for classification of images or"):
        run(Experiment.preset("spam-demo").override({"model.name": "my_networks:residual"}), out=outside / "no")


def test_the_data_set_is_learned_and_is_called_made_up(outside: Path) -> None:
    experiment = digits("data.dataset=my_data:rings", "data.dataset.noise=0")
    dataset = load(experiment.data, 0).dataset
    assert dataset.made_up
    radius = np.linalg.norm(dataset.train.features, axis=1)
    np.testing.assert_allclose(radius, np.where(dataset.train.labels == 1, 0.5, 1.0), rtol=1e-5)
    result = trained(outside / "run", "data.dataset=my_data:rings", "federation.rounds=15")
    assert result.summary["test_accuracy"] > 0.9


def test_the_metric_is_a_column_of_the_record(outside: Path) -> None:
    result = trained(outside / "run", 'evaluation.metrics=["my_metrics:confidence"]', "federation.rounds=2")
    assert result.metrics.test_confidence.between(0.1, 1).all()
    assert result.metrics.test_confidence.iloc[-1] > result.metrics.test_confidence.iloc[0]
    with pytest.raises(SettingsError, match="confidense"):
        trained(outside / "no", 'evaluation.metrics=["my_metrics:confidense"]')


def test_the_attack_is_run_with_its_settings_beside_guessing(outside: Path) -> None:
    experiment = Experiment.preset("digits")
    one = attack("my_attacks:risen_classes", experiment, trials=20)
    assert one.refused is None
    assert one.mean()["accuracy"] > 0.95 > 0.5 > one.mean(baseline=True)["accuracy"]
    assert one.summary()["settings"] == {"share": 0.5}
    batch, asked = experiment.override({"training.batch_size": 8}), frozenset({"training.batch_size"})
    found = [
        attack("my_attacks:risen_classes", batch, settings={"share": share}, trials=20, asked=asked).mean()["accuracy"]
        for share in (0.0, 0.9)
    ]
    assert found[0] > found[1]  # of eight examples, all classes that rose are held, not the highest alone


def test_the_attack_is_checked_and_explained_from_outside(outside: Path) -> None:
    name = "my_attacks:risen_classes"
    assert "\n  share = 0.5  of the highest rise" in describe(ATTACKS, name, "attack")
    with pytest.raises(SettingsError, match=r"attack\.shares: unknown .* did you mean 'attack\.share'"):
        attack(name, Experiment.preset("digits"), settings={"shares": 0.1})
    with pytest.raises(SettingsError, match=r"attack\.share = 1\.5: must be less than 1"):
        attack(name, Experiment.preset("digits"), settings={"share": 1.5})
    with pytest.raises(SettingsError, match=r"take model\.name = 'mlp'"):
        attack(name, Experiment.preset("digits").override({"model.name": "my_networks:residual"}))
    assert AttackChoice(name, share=0.1).share == 0.1


def test_the_attack_takes_its_settings_from_the_command_line(outside: Path) -> None:
    from fedveil.cli import app

    words = ["attack", "my_attacks:risen_classes", "--set", "attack.share=0.25", "--trials", "4", "--json"]
    answer = CliRunner().invoke(app, [*words, "--out", str(outside / "out")], catch_exceptions=False)
    assert json.loads(answer.stdout)["settings"] == {"share": 0.25}
    with pytest.raises(SettingsError, match=r"attack\.share: name the attack"):
        CliRunner().invoke(app, ["attack", "matrix", "--set", "attack.share=0.25"], catch_exceptions=False)


def test_the_attack_with_settings_is_a_row_of_the_matrix() -> None:
    from fedveil.simulations.attacks.lab.matrix import Column, Row, _own

    assert isinstance(_own("my_attacks:risen_classes"), Row)
    assert isinstance(_own("my_transforms:random_mask"), Column)


def test_the_adversary_spoils_a_mean_and_not_a_median(outside: Path) -> None:
    adversaries = module("my_adversaries")
    liars = adversaries.sign_flip(adversaries.SignFlip(clients=2, scale=3.0))
    settings = ["federation.rounds=4", "federation.cohort=6"]
    found = {
        (strategy, lies): trained(
            outside / f"{strategy}-{lies}",
            *settings,
            f"federation.strategy={strategy}",
            adversary=liars if lies else None,
        ).summary["test_accuracy"]
        for strategy in ("fedavg", "fedmedian")
        for lies in (False, True)
    }
    assert found["fedavg", True] < found["fedavg", False] - 0.3
    assert found["fedmedian", True] > found["fedavg", True] + 0.2


def test_an_adversary_is_refused_where_clients_are_computed_one_at_a_time(outside: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(SettingsError, match="computes one client at a time, and an adversary sees a cohort"):
        run(digits().override({"engine": "ray"}), out=outside / "run", adversary=lambda _contributions: None)


def _package(folder: Path) -> Path:
    """A copy of the package, laid out as it is installed."""
    mapped = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, place in mapped.items():
        if name.count(".") <= 1:
            target = folder.joinpath(*name.split("."))
            shutil.copytree(CHECKOUT / place, target, dirs_exist_ok=True)
    return folder / "fedveil"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}


def _add(package: Path, table: str, example: str, home: str, line: str) -> None:
    """Add a part: its file, and its line in the catalog."""
    before = _files(package)
    (package / home).write_text(EXAMPLES[example])
    catalog = package / "core" / "catalog.py"
    start = re.compile(rf'^{table} = Table\(\n    ".*",\n    {{\n', re.MULTILINE)
    text, number = start.subn(lambda found: found[0] + line, catalog.read_text())
    assert number == 1, table
    catalog.write_text(text)
    touched = [name for name, code in _files(package).items() if before.get(name) != code]
    assert sorted(touched) == sorted([home, "core/catalog.py"])


def _in(package: Path, code: str, folder: Path) -> dict[str, Any]:
    """What code says, run with a copy of the package and without the user's folder."""
    said = subprocess.run(
        [sys.executable, "-c", f"import fedveil, json\nhome = fedveil.__file__\n{code}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(package.parent)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    told: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    assert told["home"] == str(package / "__init__.py")
    return told


@pytest.mark.parametrize(
    ("table", "example", "home", "listed", "key", "setting", "value"),
    [
        ("STRATEGIES", "my_rules.py", "algorithms/rules/clipped_mean.py", "strategies", "federation.strategy", "longest", 2.0),
        ("PARTITIONS", "my_partitions.py", "datasets/partition/geometric.py", "partitions", "data.partition", "ratio", 0.5),
    ],
    ids=["a rule", "a partition"],
)  # fmt: skip
def test_inside_the_package_a_part_is_a_file_and_a_line(
    table: str, example: str, home: str, listed: str, key: str, setting: str, value: float, outside: Path
) -> None:
    package, folder = _package(outside / "copy"), outside / "elsewhere"
    folder.mkdir()
    _add(package, table, example, home, LINES[table])
    name = LINES[table].split('"')[1]
    code = f"""
from typer.testing import CliRunner
from fedveil import Experiment, SettingsError, run
from fedveil.cli import app
from fedveil.core.settings.experiment import known_keys

def error(settings):
    try:
        experiment.override(settings)
    except SettingsError as found:
        return str(found)

experiment = Experiment.preset("digits").override({{"federation.rounds": 1, "{key}": "{name}", "{key}.{setting}": {value}}})
print(json.dumps({{
    "home": home,
    "list": CliRunner().invoke(app, ["list", "{listed}", "--json"]).stdout,
    "show": CliRunner().invoke(app, ["show", "{listed}", "{name}"]).stdout,
    "key": known_keys().get("{key}.{setting}"),
    "wrong": error({{"{key}.{setting}s": 1.0}}),
    "misspelt": error({{"{key}": "{name}s"}}),
    "accuracy": run(experiment, out="run", plots=False).summary["test_accuracy"],
    "toml": open("run/experiment.toml").read(),
}}))
"""
    told = _in(package, code, folder)
    assert json.loads(told["list"])[name] == LINES[table].split('"')[5]
    assert setting in told["show"]
    assert told["key"].startswith(f"{name}: ")
    assert f"did you mean '{key}.{setting}'" in told["wrong"]
    assert f"did you mean '{name}'" in told["misspelt"]
    assert f'name = "{name}"' in told["toml"]
    assert told["accuracy"] > 0.2


def test_inside_the_package_parts_of_the_other_kinds_are_a_file_and_a_line_each(outside: Path) -> None:
    package, folder = _package(outside / "copy"), outside / "elsewhere"
    folder.mkdir()
    for table, example, home, part in [
        ("STRATEGIES", "my_algorithms.py", "algorithms/fedlion.py", "fedlion"),
        ("DEFENCES", "my_transforms.py", "privacy/random_mask.py", "random_mask"),
        ("MODELS", "my_networks.py", "models/networks/residual.py", "residual"),
        ("DATASETS", "my_data.py", "datasets/published/rings.py", "rings"),
        ("ATTACKS", "my_attacks.py", "simulations/attacks/risen_classes.py", "risen_classes"),
    ]:
        path = home.removesuffix(".py").replace("/", ".")
        _add(package, table, example, home, f'        "{part}": ("fedveil.{path}:{part}", "an added part"),\n')
    code = """
from fedveil import Experiment, run
from fedveil.simulations.attacks import run as attack

digits = Experiment.preset("digits").override({"engine": "sequential"})
mine = {
    "federation.rounds": 2, "federation.strategy": "fedlion", "privacy.defence": "random_mask", "privacy.defence.kept": 0.9,
    "data.dataset": "rings", "model.name": "residual", "model.depth": 1, "training.learning_rate": 0.1,
}
result = run(digits.override(mine), out="run", plots=False)
outcome = attack("risen_classes", digits, trials=5, settings={"share": 0.9})
print(json.dumps({"home": home, "loss": result.summary["test_loss"], "accuracy": outcome.mean()["accuracy"]}))
"""
    told = _in(package, code, folder)
    assert 0 < told["loss"] < 2
    assert told["accuracy"] > 0.95


def test_links_of_the_page_lead_somewhere() -> None:
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target[1:] in anchors if target.startswith("#") else (CHECKOUT / target).exists(), target
