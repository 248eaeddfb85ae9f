"""What environment.json tells of a run: versions, machine, command and commit, and no secret of the command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HIDDEN = "***"
# names of options and settings whose value is a secret; the path of a file with one is none
_SECRET = re.compile(r"(?i)^[-\w.]*(token|secret|passw(or)?d|passphrase|credentials?|api[-_]?key|private[-_]?key)$")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")  # a user, and perhaps a password, in a URL


def environment(device: str, command: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what is needed to repeat a run: versions, machine, command, commit."""
    packages = ("fedveil", "flwr", "torch", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "command": without_secrets(list(command) or sys.argv),
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def without_secrets(command: Sequence[str]) -> list[str]:
    """Return the words of a command with each secret replaced by ***: `--token X`, `--token=X`, `https://user:X@host`."""
    told: list[str] = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide:
            told.append(HIDDEN)
        elif equals and _SECRET.match(name):
            told.append(f"{name}={HIDDEN}")
        else:
            told.append(_LOGIN.sub(f"{HIDDEN}@", word))
        hide = word.startswith("-") and _SECRET.match(word) is not None
    return told


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
