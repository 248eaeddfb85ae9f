"""Random bytes for every parser of what others send or what a file holds: which tests throw them, and how many.

`make test` throws some thousands; `make claims` sets FEDVEIL_FUZZ, 100000 for what others send and 10000 for a user's own
files, and each of these tests throws so many.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]
VARIABLE = "FEDVEIL_FUZZ"
STRANGERS = ("tests/privacy", "tests/core/test_framing.py")  # tests of what others send
OWN_FILES = ("tests/datasets/own",)  # tests of what a user's file holds


def inputs(usual: int) -> int:
    """How many inputs each parser gets; `usual`: in `make test`."""
    return int(os.environ.get(VARIABLE, usual))


def parses(*parsers: str, usual: int) -> Callable[[Any], Any]:
    """Mark a hypothesis test that throws bytes at these parsers, `usual` times in `make test`."""

    def mark(test: Any) -> Any:
        return pytest.mark.fuzz(*parsers)(settings(max_examples=inputs(usual), deadline=None)(test))

    return mark


def name_parsers(items: list[pytest.Item]) -> None:
    """Let each report of such a test name its parsers."""
    for item in items:
        for mark in item.iter_markers("fuzz"):
            item.user_properties += [("parser", name) for name in mark.args]


def throw(number: int, tests: Sequence[str] = STRANGERS, limit: float = 7200.0) -> dict[str, bool]:
    """Run these tests alone with so many inputs each: whether a parser stood all of them, by its name.

    tests: files and folders of tests
    limit: seconds for all; a parser that hangs fails, and with it those whose tests had not ended
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-m", "fuzz", "-n", "2", "--dist", "worksteal", "-q", "-p", "no:cacheprovider",
            f"--junitxml={report}", *tests,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {VARIABLE: str(number)}, timeout=limit, check=False)
        if not report.exists():
            raise RuntimeError(
                f"the tests that throw random bytes were ended with {done.returncode}, and left no report"
            )
        stood: dict[str, bool] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
            for parser in (entry.attrib["value"] for entry in case.iter("property")):
                stood[parser] = stood.get(parser, True) and passed
    if done.returncode == 0 or not all(stood.values()):
        return stood
    raise RuntimeError(f"the tests that throw random bytes ended with {done.returncode}")
