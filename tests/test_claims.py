"""The claims of docs/results.md, each with one seed; `make claims` measures all seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from claims import CLAIMS, Claim, measure


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_holds_for_one_seed(claim: Claim) -> None:
    folder = os.environ.get("FEDVEIL_DATA", "")
    if claim.needs_data and not (Path(folder) / claim.needs_data).is_dir():
        pytest.skip(f"needs the real {claim.needs_data} data: set FEDVEIL_DATA to the folder that holds it")
    ((value, _),) = measure(claim, [0], quick=True)
    assert claim.holds(value, single=True), f"{claim.what}: {value}, claimed {claim.target}"


def test_the_table_of_results_holds_every_claim() -> None:
    table = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    assert all(f"| {claim.name} | {claim.what} | {claim.target} |" in table for claim in CLAIMS)
    assert "missed" not in table
