"""The claims of docs/results.md, each with one seed; `make claims` measures all seeds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from claims.presets import CLAIMS, Claim, Measured, measure
from claims.private import PRIVATE
from claims.protected import COMPARISONS, PROTECTED, judge

from fedveil import Experiment
from fedveil.server.protection import masked

NAMED = {claim.preset: claim for claim in reversed(CLAIMS)}
QUICK = [
    replace(NAMED[preset], quick={"federation.rounds": rounds, "workers": 1})
    for preset, rounds in {"digits": 8, "spam-demo": 3, "mnist-mlp": 2}.items()
]
APART = 0.02  # one seed alone, whose last bits differ: a few test examples


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes longer to draw than to train here."""
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])


def skip_without_data(claim: Claim) -> None:
    folder = os.environ.get("FEDVEIL_DATA", "")
    if claim.needs_data and not (Path(folder) / claim.needs_data).is_dir():
        pytest.skip(f"needs the real {claim.needs_data} data: set FEDVEIL_DATA to the folder that holds it")


@pytest.mark.parametrize("claim", [*CLAIMS, *PRIVATE], ids=lambda claim: claim.name)
def test_a_claim_holds_for_one_seed(claim: Claim) -> None:
    skip_without_data(claim)
    (run,) = measure(claim, [0], quick=True)
    assert claim.holds(run.value, single=True), f"{claim.what}: {run.value}, claimed {claim.target}"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("claim", QUICK, ids=lambda claim: claim.preset)
def test_a_protected_run_reaches_what_a_plain_one_does_and_every_round_is_the_plain_mean_on_the_grid(
    claim: Claim,
) -> None:
    skip_without_data(claim)
    plain = measure(claim, [0], quick=True)
    for protection in PROTECTED:
        verdict = judge(plain, measure(claim, [0], protection=protection, quick=True), APART)
        assert verdict.holds, (protection, verdict)


@pytest.mark.usefixtures("no_pictures")
def test_a_protection_that_loses_a_thousandth_of_every_weight_misses_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = replace(NAMED["digits"], quick={"federation.rounds": 2})
    plain, right = measure(claim, [0], quick=True), masked.dequantize
    monkeypatch.setattr(masked, "dequantize", lambda *given: right(*given) * 0.999)
    verdict = judge(plain, measure(claim, [0], protection="secagg", quick=True), APART)
    assert verdict.near
    assert not verdict.exact
    assert not verdict.holds


def runs(*values: float, clipped: int = 0, error: float = 1e-6) -> list[Measured]:
    return [Measured(value, 1.0, {"clipped": clipped, "largest_error": error, "error_bound": 2e-6}) for value in values]


def test_a_verdict_asks_for_the_median_the_clipping_and_the_error() -> None:
    plain = runs(0.95, 0.96, 0.97, 0.99, 0.94)
    assert judge(plain, runs(0.93, 0.91, 0.99)).difference == pytest.approx(-0.03)
    assert judge(plain, runs(0.92, 0.91, 0.99)).holds
    assert not judge(plain, runs(0.9, 0.90, 0.99)).holds
    assert not judge(plain, runs(*(3 * [float("nan")]))).holds
    assert not judge(plain, runs(0.96, 0.96, 0.96, clipped=1)).holds
    assert not judge(plain, runs(0.96, 0.96, 0.96, error=3e-6)).holds


def test_the_table_of_results_holds_every_claim() -> None:
    table = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    assert all(f"| {claim.name} | {claim.what} | {claim.target} |" in table for claim in [*CLAIMS, *PRIVATE])
    for comparison in COMPARISONS:
        for protection in ("none", *comparison.protections):
            assert f"| {comparison.claim.name} | {comparison.claim.what} | {protection} |" in table
    assert "random inputs for each parser" in table
    assert "missed" not in table


def test_every_preset_without_noise_is_compared_under_every_protection() -> None:
    from fedveil.core.catalog import PRESETS

    plain = [preset for preset in PRESETS if not Experiment.preset(preset).privacy.noisy]
    compared = {(comparison.claim.preset, name) for comparison in COMPARISONS for name in comparison.protections}
    assert compared == {(preset, name) for preset in plain for name in PROTECTED}
