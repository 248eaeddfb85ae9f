"""An audit passes what is right, and refutes noise that is halved or used twice, and a clip that is missing.

The faults are planted in the functions of the product, beneath an audit that knows nothing of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import audits
from claims.audits import ALL

from fedveil import Experiment, SettingsError
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.simulations.audit.canaries import Canaries
from fedveil.simulations.audit.report import LIMITS, PAGE, write_report
from fedveil.simulations.audit.run import CANARIES as MOST
from fedveil.simulations.audit.run import (
    EXAMPLES,
    MEMORY,
    PROTECTED,
    Audit,
    is_gaussian,
    judge,
    usual_number,
    with_canaries,
)

# two rounds, and a claim of 2.75
SMALL = {**ALL, "federation.rounds": 2, "privacy.noise_multiplier": 3 / math.sqrt(2), "model.hidden": [64]}
CANARIES = 2500


def audited(seed: int = 0, **settings: Any) -> Audit:
    return audits.audited(seed, CANARIES, **{**SMALL, **settings})


@pytest.mark.slow
def test_a_right_run_is_not_refuted_and_its_estimate_is_near_the_claim() -> None:
    found = audited()
    assert found.claim == pytest.approx(2.753, abs=0.001)
    assert found.bound_gaussian is not None
    assert found.estimate is not None
    assert 0.5 < found.bound < found.bound_gaussian < found.claim
    assert found.estimate == pytest.approx(found.claim, abs=0.4)
    assert not found.refuted
    assert found.verdict.startswith("not refuted")


@pytest.mark.slow
@pytest.mark.parametrize("fault", audits.FAULTS)
def test_a_fault_is_refuted(fault: str) -> None:
    with audits.FAULTS[fault]():
        found = audited()
    assert found.claim == pytest.approx(2.753, abs=0.001)  # the accounting knows nothing of the fault
    assert found.refuted
    assert found.verdict.startswith("refuted: this run gives away epsilon")


@pytest.mark.slow
def test_noise_that_is_used_twice_passes_where_no_canary_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.simulations.audit.canaries.TURNS", 10**9)
    with audits.reused():
        assert not audited().refuted


def test_at_a_large_claim_halved_noise_passes_the_bounds_and_not_the_estimate() -> None:
    """What `LIMITS` says."""
    experiment = Experiment.preset("digits").override({**SMALL, "privacy.noise_multiplier": 1.0})
    claim = gaussian_epsilon(1.0, 2, 1e-5)
    assert claim > 6
    found = judge(experiment, claim, "", scored(4000, 2 * math.sqrt(2), 0))
    assert not found.refuted
    assert found.estimate is not None
    assert found.estimate > 2 * claim
    assert "worth a look" in found.verdict
    assert "7" in LIMITS[0]


def scored(number: int, mu: float, seed: int) -> Canaries:
    """Canaries with the scores that a Gaussian mechanism of this mu over two rounds would give them."""
    canaries = Canaries.draw(number, 10, 2, number, 1.0, seed)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(number) * np.where(canaries.turns, canaries.lost, 1.0) / mu
    canaries.asked[:] = True
    canaries.told[0] = canaries.included + noise
    canaries.told[1] = np.where(canaries.turns, 0.0, canaries.told[0])
    return canaries


def test_of_twenty_right_runs_none_is_refuted_and_of_twenty_with_half_the_noise_all_are() -> None:
    experiment = Experiment.preset("digits").override(SMALL)
    claim, mu = gaussian_epsilon(1.5, 1, 1e-5), 1 / 1.5
    for seed in range(20):
        right, half = (judge(experiment, claim, "", scored(4000, factor * mu, seed)) for factor in (1, 2))
        assert not right.refuted
        assert half.refuted
        assert right.estimate == pytest.approx(claim, rel=0.2)
        assert right.estimate_turns == pytest.approx(claim, rel=0.6)


@pytest.mark.slow
def test_an_audit_of_clients_that_add_noise_looks_at_each_answer() -> None:
    found = audited(**{"privacy.noise_at": "client"})
    assert "each update" in found.against
    assert found.claim == pytest.approx(2.753, abs=0.001)
    assert found.estimate == pytest.approx(found.claim, abs=0.4)
    assert not found.refuted


@pytest.mark.slow
def test_halved_noise_of_clients_is_refuted() -> None:
    with audits.halved():
        assert audited(**{"privacy.noise_at": "client"}).refuted


def test_the_page_of_results_has_a_row_for_every_fault() -> None:
    measured = [audits.Audited(fault, [judged(2 if fault else 1)]) for fault in ("", *audits.FAULTS)]
    assert all(each.holds for each in measured)
    text = audits.section(measured)
    assert all(f"| {fault} |" in text for fault in ("right", *audits.FAULTS))
    assert "missed" not in text
    assert "(missed)" in audits.section([audits.Audited("no clip", [judged(1)])])


def judged(factor: float) -> Audit:
    experiment = Experiment.preset("digits").override(SMALL)
    return judge(experiment, gaussian_epsilon(1.5, 1, 1e-5), "", scored(4000, factor / 1.5, 0))


@pytest.mark.parametrize(
    ("settings", "gaussian"),
    [
        ({}, True),
        ({"federation.cohort": 5}, False),
        ({"federation.cohort": 5, "privacy.noise_at": "client"}, True),
        ({"federation.cohort": 5, "federation.sampling": "order"}, True),
        ({"federation.sampling": "poisson"}, False),
    ],
)
def test_the_gaussian_s_curve_is_asked_for_where_no_secret_sampling_is_claimed(settings, gaussian) -> None:
    experiment = Experiment.preset("digits").override({**SMALL, **settings})
    assert is_gaussian(experiment) == gaussian
    found = judge(experiment, 2.75, "", scored(1000, 1.0, 0))
    assert (found.bound_gaussian is None) != gaussian


def test_what_claims_nothing_and_more_canaries_than_delta_allows_are_refused() -> None:
    with pytest.raises(SettingsError, match="adds no noise"):
        with_canaries(Experiment.preset("digits"), 100)
    with pytest.raises(SettingsError, match=r"below 1 / 1,010"):
        with_canaries(Experiment.preset("digits").override({**SMALL, "privacy.delta": 1e-3}), 1000)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"model.hidden": [128, 64]}, MOST),
        ({"model.hidden": [8]}, 64 * 8 + 8 + 80 + 10),
        ({"model.hidden": [4096]}, MEMORY // (64 * 4096 + 4096 + 40960 + 10)),
        ({"privacy.protection": "secagg", "privacy.noise_at": "distributed"}, PROTECTED),
        ({"privacy.unit": "example", "privacy.noise_at": "client"}, EXAMPLES),
    ],
)
def test_without_a_number_there_are_as_many_canaries_as_fit(settings, number) -> None:
    assert usual_number(Experiment.preset("digits").override({**SMALL, **settings})) == number


def test_a_report_holds_the_numbers_the_picture_and_what_is_not_shown(tmp_path: Path) -> None:
    found = judge(
        Experiment.preset("digits").override({**SMALL, "name": "mine"}),
        2.75,
        "against all",
        scored(1000, 4.0, 0),
    )
    assert found.refuted
    page = write_report(tmp_path / "audit", found)
    assert page.name == PAGE
    text = page.read_text()
    assert "The claim is refuted" in text
    assert all(line.split(",")[0] in text for line in LIMITS)
    told = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert told["claim"] == 2.75
    assert told["refuted"] is True
    assert {"bound", "bound_gaussian", "estimate", "delta", "canaries", "verdict"} <= set(told)
    with np.load(tmp_path / "audit" / "scores.npz") as kept:
        assert len(kept["steady"]) + len(kept["turns"]) == 1000
    assert (tmp_path / "audit" / "curves.png").read_bytes()[:4] == b"\x89PNG"
