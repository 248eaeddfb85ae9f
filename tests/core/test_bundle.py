"""The bundle: the same bytes from the same FedVeil, and nothing of a stranger's is executed or unpacked."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from flwr.common.config import get_fab_config
from hypothesis import example, given
from hypothesis import strategies as st

from fedveil.core.errors import DeploymentError
from fedveil.core.wire.bundle import ROOMS, SETTINGS, bundle, check_bundle, code


def packed(**files: str) -> bytes:
    """A stranger's bundle."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return whole.getvalue()


def test_another_process_makes_the_same_bundle() -> None:
    line = "from fedveil.core.wire.bundle import bundle; print(bundle().hex())"
    made = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert bytes.fromhex(made.stdout) == bundle()
    check_bundle(bundle())


def test_flower_reads_it_as_an_app_whose_code_is_installed() -> None:
    app = get_fab_config(bundle())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "fedveil.server.app:app", "clientapp": "fedveil.client.app:app"}
    assert set(app["config"]) == set(SETTINGS)
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]


@pytest.mark.parametrize("changed", ["client/app.py", "privacy/leakage/guard.py", "algorithms/__init__.py"])
def test_a_changed_line_of_code_is_another_bundle(tmp_path, changed) -> None:
    import fedveil.core

    found = Path(next(iter(fedveil.core.__path__))).parent
    copy = tmp_path / "fedveil"
    for room in ROOMS:
        shutil.copytree(found / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").write_text("")
    line = "from fedveil.core.wire.bundle import code; print(code())"

    def digest() -> str:
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.strip()

    assert digest() == code()
    with (copy / changed).open("a") as file:
        file.write("# one more line\n")
    assert digest() != code()


@pytest.mark.parametrize(
    ("content", "described"),
    [
        (b"", "no app that can be read"),
        (b"PK\x05\x06 not a whole archive", "no app that can be read"),
        (packed(readme="hello"), "no app that can be read"),
        (packed(pyproject__toml="[project"), "no app that can be read"),
        (packed(pyproject__toml="project = 3"), "no app that can be read"),
        (packed(pyproject__toml="#" * (1 << 20) + "#"), "an oversized project file"),
        (packed(pyproject__toml='[project]\nname = "evil"\nversion = "6"'), "'evil' 6, not of FedVeil"),
        (
            packed(
                pyproject__toml='[project]\nname = "fedveil"\nversion = "9.9"\n[tool.fedveil]\ncode = "abcdef0123456789"'
            ),
            "FedVeil 9.9 (code abcdef012345)",
        ),
    ],
    ids=["empty", "broken", "no-project", "no-toml", "no-table", "oversized", "evil", "version"],
)
def test_a_strangers_bundle_is_refused_with_both_named(content, described) -> None:
    with pytest.raises(DeploymentError, match="install the same FedVeil on both") as refused:
        check_bundle(content)
    assert described in str(refused.value)
    assert f"FedVeil {version('fedveil')} (code {code()[:12]})" in str(refused.value)


@given(st.binary(max_size=400), st.integers(0, 800))
@example(b"\x02", 29)  # zipfile ends in an EOFError
def test_any_other_bytes_are_refused(noise, at) -> None:
    changed = bundle()[:at] + noise + bundle()[at + len(noise) :]
    if changed == bundle():
        return
    with pytest.raises(DeploymentError):
        check_bundle(changed)


def test_a_bundle_that_says_it_is_this_very_fedveil_and_is_not_is_called_what_it_is() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        project = archive.read("pyproject.toml").decode()
    with pytest.raises(DeploymentError, match="and is not: it was made by somebody else; nothing of it is used"):
        check_bundle(packed(pyproject__toml=project, evil="code"))
