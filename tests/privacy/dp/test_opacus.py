"""Epsilon beside Opacus' PRV accountant (Gopi, Lee and Wutschitz 2021), where `make peers` has installed Opacus."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fedveil.privacy.dp.accounting.accountants import poisson_epsilon

PYTHON = Path(__file__).parents[3] / ".venv-opacus" / "bin" / "python"
# rate, multiplier, releases, delta; and what Opacus 1.6.0 said
CASES = [(0.1, 1.0, 100, 1e-5, 7.06), (0.01, 0.8, 200, 1e-5, 1.81), (0.001, 0.6, 100, 1e-7, 2.08)]
SCRIPT = """
import json, sys
from opacus.accountants import PRVAccountant
found = []
for rate, multiplier, releases, delta in json.loads(sys.argv[1]):
    accountant = PRVAccountant()
    accountant.history = [(multiplier, rate, releases)]
    found.append(float(accountant.get_epsilon(delta=delta, eps_error=0.001)))
print(json.dumps(found))
"""


@pytest.mark.parametrize(("rate", "multiplier", "releases", "delta", "wanted"), CASES)
def test_epsilon_is_what_opacus_said(rate, multiplier, releases, delta, wanted) -> None:
    assert poisson_epsilon(multiplier, rate, releases, delta) == pytest.approx(wanted, rel=0.01)


@pytest.mark.skipif(not PYTHON.is_file(), reason="Opacus is not here: make peers")
def test_epsilon_is_what_opacus_says() -> None:
    cases = [*(case[:4] for case in CASES), (0.02, 1.2, 500, 1e-6), (0.5, 3.0, 40, 1e-5)]
    said = subprocess.run([PYTHON, "-P", "-c", SCRIPT, json.dumps(cases)], capture_output=True, text=True, check=True)
    for (rate, multiplier, releases, delta), wanted in zip(cases, json.loads(said.stdout), strict=True):
        assert poisson_epsilon(multiplier, rate, releases, delta) == pytest.approx(wanted, rel=0.01)
