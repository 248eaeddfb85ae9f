"""What every preset reaches under each protection, held against the same runs in the clear."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from claims.presets import CENTRAL, CLAIMS, Claim, Measured

SEEDS = 3  # of protected runs; runs in the clear have the claim's


LATTICES = ("ckks", "bfv")
PROTECTED = (*LATTICES, "secagg")


@dataclass(frozen=True)
class Comparison:
    """An experiment, and the protections it is measured under."""

    claim: Claim
    protections: tuple[str, ...] = PROTECTED


_BY_PRESET = {claim.preset: claim for claim in CLAIMS if claim.settings != CENTRAL}
_MILLION = _BY_PRESET.pop("million")

# fedadam is no sum of ciphertexts, so the lattices take fedavg, and BFV adds fewer than 1,000 clients
COMPARISONS = [
    *(Comparison(claim) for claim in _BY_PRESET.values()),
    Comparison(
        replace(_MILLION, name="million (made-up data), cohort 1,000, 3 rounds", settings={"federation.rounds": 3}),
        ("secagg",),
    ),
    Comparison(
        replace(
            _MILLION,
            name="million (made-up data), cohort 600, 3 rounds of fedavg",
            settings={
                "federation.strategy": "fedavg", "federation.cohort": 600,
                "federation.rounds": 3,
            },
        ),
        LATTICES,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Protected runs beside the same seeds in the clear.

    difference: of the medians, protected minus plain
    noise: how far that may lie from 0
    clipped: weights that lay outside privacy.protection.range, in all runs
    error: largest distance of a round's model from the plain mean of its clients' weights, in any run
    bound: what rounding to the grid and to float32 alone can make of it
    """

    difference: float
    noise: float
    clipped: int
    error: float
    bound: float

    @property
    def near(self) -> bool:
        """Whether the protected runs reach what the plain ones do, within the noise."""
        return abs(self.difference) <= self.noise + 1e-9  # both are differences of floats

    @property
    def exact(self) -> bool:
        """Whether every round's model was the plain mean on the grid."""
        return self.clipped == 0 and self.error <= self.bound

    @property
    def holds(self) -> bool:
        """Both."""
        return self.near and self.exact


def judge(plain: Sequence[Measured], protected: Sequence[Measured], noise: float | None = None) -> Verdict:
    """Hold protected runs of seeds 0, 1, ... against plain ones, of which there may be more.

    noise: allowed; without it the range of all plain seeds, largest minus smallest
    """
    numbers = [run.value for run in plain]
    same = statistics.median(numbers[: len(protected)])
    return Verdict(
        difference=statistics.median(run.value for run in protected) - same,
        noise=max(numbers) - min(numbers) if noise is None else noise,
        clipped=sum(run.costs["clipped"] for run in protected),
        error=max(run.costs["largest_error"] for run in protected),
        bound=min(run.costs["error_bound"] for run in protected),
    )


Runs = dict[str, list[Measured]]  # by protection, "none" among them


def section(measured: dict[str, Runs]) -> tuple[str, list[str]]:
    """The section of docs/results.md, from each comparison's runs, and the names of those that do not hold."""
    rows, failed = [], []
    for comparison in COMPARISONS:
        claim, runs = comparison.claim, measured[comparison.claim.name]
        plain = runs["none"]
        rows.append(f"| {claim.name} | {claim.what} | none | {_values(plain)} | | | | | |")
        for protection in comparison.protections:
            protected = runs[protection]
            verdict = judge(plain, protected)
            failed += [] if verdict.holds else [f"{claim.name}, {protection}"]
            up, down = (
                statistics.median(run.costs[f"bytes_{way}_ratio"] for run in protected) for way in ("up", "down")
            )
            rows.append(
                f"| {claim.name} | {claim.what} | {protection} | {_values(protected)} | "
                f"{verdict.difference:+.4f} of ±{verdict.noise:.4f}{_missed(verdict.near)} | "
                f"{verdict.clipped} | {verdict.error:.1e} of {verdict.bound:.1e}{_missed(verdict.exact)} | {up:.2f} | {down:.2f} |"
            )
    return (
        f"""
## Protected runs

Every preset under every protection, seeds 0 to {SEEDS - 1}, beside the same experiment in the clear. How to read a row: protected runs reach
what plain ones do if the difference of their median from the plain median of the same seeds is within the range of all plain
seeds listed, largest minus smallest ("of ±"); and each round's model is the plain mean on the grid if nothing was clipped and
no weight, in any round, lay further from the mean of the clients' plain weights than rounding to the grid and to float32 alone
can move it ("of"). The second would show an update that was lost, added twice or bent. Up and down: bytes, as multiples of
those in the clear. Single seeds part as soon as a last bit differs, here as between two engines; their spread is what the range
of the plain seeds is for.

| preset | measured | protection | median: each seed | difference | clipped | largest error | up | down |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

`million` averages with fedadam, which cannot be computed on ciphertexts: the settings refuse it, and CKKS and BFV are measured with
fedavg, in cohorts that BFV can add. Secure aggregation works with it.
""",
        failed,
    )


def _values(runs: Sequence[Measured]) -> str:
    numbers = [run.value for run in runs]
    return f"**{statistics.median(numbers):.4g}**: " + ", ".join(f"{number:.4g}" for number in numbers)


def _missed(held: bool) -> str:
    return "" if held else " (missed)"
