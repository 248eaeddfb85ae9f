"""Check the types of the checkout as a user's environment would hold it; a mistake ends with mypy's words and exit code.

The folders of the checkout are the subpackages of `fedveil`, which mypy cannot follow through an editable install: here a
temporary folder gets links in the places that pyproject.toml maps them to, in no time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Lay the package out and run mypy on it and on what lies beside it."""
    folders = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as temporary:
        for package, folder in folders.items():
            place = Path(temporary, *package.split("."))
            place.mkdir()
            for path in (CHECKOUT / folder).glob("*.py*"):
                (place / path.name).symlink_to(path)
        (Path(temporary) / "benchmarks").symlink_to(CHECKOUT / "benchmarks")
        command = [sys.executable, "-m", "mypy", "--config-file", str(CHECKOUT / "pyproject.toml")]
        command += ["--cache-dir", str(CHECKOUT / ".mypy_cache"), "-p", "fedveil", "-p", "benchmarks"]
        return subprocess.run(command, cwd=temporary, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
