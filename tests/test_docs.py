"""The documentation is true: its Python runs, its commands are understood, its links lead somewhere.

`python tests/test_docs.py` writes the table of settings into docs/experiments.md.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil import Experiment
from fedveil.core.experiment import known_keys

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
BAR = "\\|"  # a bar within a cell of a table
MARK = ("<!-- settings -->\n", "<!-- end of settings -->\n")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def settings_table() -> str:
    """Every setting, its default and its description, as Markdown."""
    defaults = Experiment().model_dump()

    def default(key: str) -> str:
        value = defaults
        for part in key.split("."):
            value = value[part]
        words = {None: "", True: "true", False: "false"}
        return (
            words[value]
            if value is None or isinstance(value, bool)
            else str(list(value) if isinstance(value, tuple) else value)
        )

    rows = [
        f"| `{key}` | {f'`{default(key)}`' if default(key) else ''} | {text.replace('|', BAR)} |"
        for key, text in known_keys().items()
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows]) + "\n"


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
    words = shlex.split(command.split(">")[0])
    if words[1] == "run" and "--resume" not in words:
        words.append("--show")  # settings are resolved and checked; whole runs are tested elsewhere
    elif words[1] == "run" or words[1] == "data":
        words.append("--help")
    answer = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_the_example_of_a_users_own_network_trains(tmp_path) -> None:
    (code,) = [code for page, code in PYTHON if "# my_networks.py" in code]
    (tmp_path / "my_networks.py").write_text(code)
    words = ["run", "digits", "--set", "model.name=my_networks:cnn", "--set", "federation.rounds=2", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-m", "fedveil", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_settings_is_the_settings() -> None:
    assert settings_table() in (CHECKOUT / "docs" / "experiments.md").read_text(), "run: python tests/test_docs.py"
    assert all(text for text in known_keys().values())


if __name__ == "__main__":
    path = CHECKOUT / "docs" / "experiments.md"
    before, _, rest = path.read_text().partition(MARK[0])
    path.write_text(before + MARK[0] + settings_table() + MARK[1] + rest.partition(MARK[1])[2])
