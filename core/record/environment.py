"""What is needed to repeat a run: the content of a record's environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def environment(device: str, command: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what is needed to repeat a run: versions, machine, command, commit."""
    packages = ("fedveil", "flwr", "torch", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "command": list(command) or sys.argv,
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None where it runs from no checkout."""
    here = Path(__file__).resolve()
    try:
        # where FedVeil is installed inside another project's checkout, git does not track this file
        subprocess.run(
            ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name],
            capture_output=True, timeout=5, check=True,
        )  # fmt: skip
        answer = subprocess.run(
            ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing or does not answer, or this is no checkout
    return answer.stdout.strip() or None
