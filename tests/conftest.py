"""Shared by all tests: where the real data is, and a clean environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "FEDVEIL_DATA" not in os.environ and BESIDE.is_dir():
    os.environ["FEDVEIL_DATA"] = str(BESIDE)


def pytest_make_parametrize_id(config, val, argname):
    """Bytes name no test: an archive holds the time it was made, and parallel workers must agree on every name."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped, and says so, where there is none."""
    folder = os.environ.get("FEDVEIL_DATA")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("needs the real data sets: set FEDVEIL_DATA to the folder that holds mnist/, sms/ and enron/")
    return Path(folder)
