"""What is installed: the one package `fedveil`, whole, and nothing else; and walls that hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ("core", "models", "datasets", "algorithms", "privacy", "client", "server", "simulations", "front")
MAY_IMPORT = {
    "core": {"core"},
    "models": {"core", "models"},
    "datasets": {"core", "datasets"},
    "algorithms": {"core", "models", "algorithms"},
    "privacy": {"core", "privacy"},
    "client": {"core", "models", "datasets", "algorithms", "privacy", "client"},
    "server": {"core", "models", "datasets", "algorithms", "privacy", "server"},
    "simulations": {"core", "models", "datasets", "algorithms", "privacy", "client", "server", "simulations"},
}
SOURCES = [path for folder in FOLDERS for path in sorted((CHECKOUT / folder).rglob("*.py"))]


def test_the_wheel_installs_the_package_fedveil_and_nothing_else(tmp_path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(CHECKOUT)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedveil"}
    for path in SOURCES:
        inside = "/".join(path.relative_to(CHECKOUT).parts).removeprefix("front/")
        assert f"fedveil/{inside}" in names, inside
    presets = {path.name for path in (CHECKOUT / "simulations" / "presets").glob("*.toml")}
    assert presets == {
        Path(name).name for name in names if name.startswith("fedveil/simulations/presets/") and name.endswith("toml")
    }
    assert "fedveil/py.typed" in names
    assert "fedveil = fedveil.cli:main" in entry
    assert "License-Expression: Apache-2.0" in metadata


def test_for_uv_the_checkout_requires_nothing_so_that_flower_installs_nothing(tmp_path) -> None:
    """`flwr run .` calls `uv sync` on the bundle; what it brings must need no package and no network."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    names = {re.split(r"[\s\[<>=!~;@]", each)[0] for group in groups for each in group} - {"fedveil"}
    assert set(project["tool"]["uv"]["exclude-dependencies"]) == names
    for name in project["tool"]["flwr"]["app"]["fab-include"]:
        (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
    sync = [
        "uv",
        "sync",
        "--python",
        sys.executable,
        "--no-install-project",
        "--no-install-package",
        "flwr",
        "--inexact",
    ]
    around = {
        **os.environ,
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_PROJECT_ENVIRONMENT": str(tmp_path / "env"),
    }
    answer = subprocess.run(
        [sys.executable, "-m", *sync], cwd=tmp_path, env=around, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    assert not list(site.glob("*.dist-info"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.relative_to(CHECKOUT).parts))
def test_walls_hold(path) -> None:
    folder = path.relative_to(CHECKOUT).parts[0]
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("fedveil.")}
    if folder in MAY_IMPORT:
        assert rooms <= MAY_IMPORT[folder]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.relative_to(CHECKOUT).parts))
def test_the_package_knows_nothing_of_what_lies_beside_it(path) -> None:
    beside = {"benchmarks", "tests", "examples", "docs"}
    assert not {name.split(".")[0] for name in imports(path)} & beside


def test_every_package_of_the_checkout_is_installed_and_none_hides_another() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = set(settings["package-dir"].values())
    found = {
        str(path.parent.relative_to(CHECKOUT))
        for folder in FOLDERS
        for path in (CHECKOUT / folder).rglob("__init__.py")
    }
    assert mapped == found
    assert set(settings["package-dir"]) == set(settings["packages"])
    assert not (CHECKOUT / "fedveil").exists()


def test_every_required_package_is_pinned() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    needed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=!~ ]", name)[0].lower() for name in needed} - {"fedveil"}
    assert names - pinned == set()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_the_constraints_admit_flowers_data_sets() -> None:
    """flwr-datasets 0.6.1 needs datasets 4, whose newest, 4.8.5, says `fsspec[http]<=2026.2.0,>=2023.1.0`."""
    pinned = dict(line.split("==") for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert Version("2023.1.0") <= Version(pinned["fsspec"]) <= Version("2026.2.0")
