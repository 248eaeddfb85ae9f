"""What FedVeil claims to reach, as data: `make test` checks each with fewer seeds, `make claims` with all.

Run as a script it measures every claim in full and writes docs/results.md.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (where the real data is, and no telemetry)
from kills import content, run_killed, stateful

from fedveil import Experiment, Result, run

KILLS = 50


def last(column: str) -> Callable[[Result], float]:
    """The last value of a column of metrics.csv."""
    return lambda result: float(result.metrics[column].iloc[-1])


def best(column: str) -> Callable[[Result], float]:
    """The largest value of a column of metrics.csv."""
    return lambda result: float(result.metrics[column].max())


def rounds_to(accuracy: float) -> Callable[[Result], float]:
    """The first round with this test accuracy; infinite where there is none."""

    def first(result: Result) -> float:
        reached = result.metrics[result.metrics.test_accuracy >= accuracy]
        return float(reached["round"].iloc[0]) if len(reached) else float("inf")

    return first


@dataclass(frozen=True)
class Claim:
    """One row of docs/results.md.

    measure: a number from a result; `what` names it
    low, high: the median over the seeds must lie between them
    single: as low or high, for one seed alone (`make test`); the spread over seeds is wider than the median's
    quick: settings for `make test` alone, where the whole takes too long
    needs_data: the folder of real data that must be there
    """

    name: str
    preset: str
    what: str
    measure: Callable[[Result], float]
    low: float = float("-inf")
    high: float = float("inf")
    single: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5
    needs_data: str = ""
    source: str = ""

    @property
    def target(self) -> str:
        """The range, in words."""
        if self.low > float("-inf") and self.high < float("inf"):
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low > float("-inf") else f"at most {self.high:g}"

    def holds(self, value: float, *, single: bool = False) -> bool:
        """Whether a median, or one seed's value, is within the claim."""
        low, high = self.low, self.high
        if single and self.single is not None:
            low, high = (self.single, high) if low > float("-inf") else (low, self.single)
        return low <= value <= high


CENTRAL = {
    "data.clients": 1,
    "training.epochs": 1, "federation.cohort": 1, "federation.rounds": 5, "training.batch_size": 64,
    "training.learning_rate": 0.1,
}  # fmt: skip

CLAIMS = [
    Claim("digits", "digits", "test accuracy", last("test_accuracy"), low=0.95),
    Claim("spam-demo (made-up data)", "spam-demo", "F1", last("test_f1"), low=0.9),
    Claim("mnist-mlp, 20 rounds", "mnist-mlp", "test accuracy", last("test_accuracy"), low=0.96, needs_data="mnist"),
    Claim(
        "mnist-mlp, central: one client, 5 epochs", "mnist-mlp", "test accuracy", last("test_accuracy"),
        low=0.966, high=0.976, settings=CENTRAL, needs_data="mnist", source="a plain PyTorch loop",
    ),
    Claim(
        "mnist-2nn, IID, K=100, C=0.1, E=1, B=10", "mnist-2nn", "rounds to 0.97", rounds_to(0.97),
        high=87, needs_data="mnist", source="McMahan et al. 2017, table 1: 87",
    ),
    Claim(
        "mnist-shards, 2 shards a client", "mnist-shards", "best test accuracy", best("test_accuracy"),
        low=0.93, single=0.8, quick={"federation.rounds": 25}, needs_data="mnist",
    ),
    Claim("sms-lstm, 15 rounds", "sms-lstm", "F1 on spam", last("test_f1"), low=0.92, single=0.89, needs_data="sms"),
    Claim("sms-mlp, 15 rounds", "sms-mlp", "F1 on spam", last("test_f1"), low=0.9, single=0.87, needs_data="sms"),
    Claim(
        "enron-book, 3 clients, 10 rounds", "enron-book", "test accuracy", last("test_accuracy"),
        low=0.975, needs_data="enron", source="a plain loop after Trask 2019, chapter 15: 0.985",
    ),
    Claim(
        "million (made-up data), cohort 1,000, 10 rounds", "million", "test accuracy", last("test_accuracy"),
        low=0.88, single=0.84, quick={"federation.cohort": 200},
        source="logistic regression on the pooled examples of 1,000 clients: 0.98",
    ),
]  # fmt: skip


def measure(
    claim: Claim, seeds: Sequence[int], *, quick: bool = False, progress: Callable[[str], None] = lambda _: None
) -> list[tuple[float, float]]:
    """The claim's number and the seconds of the whole run, for each seed."""
    values, more = [], claim.quick if quick else {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            experiment = Experiment.preset(claim.preset).override({**claim.settings, **more, "seed": seed})
            started = time.perf_counter()
            result = run(experiment, out=Path(folder) / "run")
            values.append((claim.measure(result), time.perf_counter() - started))
        progress(f"{claim.name}: seed {seed}: {claim.what} {values[-1][0]:.4g} in {values[-1][1]:.1f} s")
    return values


def table(measured: dict[str, list[tuple[float, float]]]) -> tuple[str, list[str]]:
    """The page docs/results.md, from each claim's values over its seeds, and the names of claims that do not hold."""
    rows, failed = [], []
    for claim in CLAIMS:
        numbers = [value for value, _ in measured[claim.name]]
        middle = statistics.median(numbers)
        held = claim.holds(middle)
        failed += [] if held else [claim.name]
        seconds = statistics.median(seconds for _, seconds in measured[claim.name])
        each = ", ".join(f"{number:.4g}" for number in numbers)
        rows.append(
            f"| {claim.name} | {claim.what} | {claim.target} | **{middle:.4g}**{'' if held else ' (missed)'} | {each} | "
            f"{seconds:.0f} s | {claim.source} |"
        )
    return (
        f"""# Results

What the presets reach, measured by `make claims` on {date.today().isoformat()} with Python {platform.python_version()} on
{os.cpu_count()} CPU cores ({platform.machine()}) that other work shared. A number is the median over seeds 0, 1, 2, ...;
the test part is the same for every seed. How each preset came to its settings: [training.md](training.md).

| preset | measured | claim | median | each seed | time of a run | for comparison |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
""",
        failed,
    )


def survives(kills: int) -> bool:
    """Whether a run that is killed so often, and resumed, ends at the models and tables of one that never was."""
    experiment = stateful("batched", rounds=12 * kills)
    with tempfile.TemporaryDirectory() as folder:
        summary, _ = run_killed(experiment, Path(folder), kills, seed=0)
        whole = run(experiment, out=Path(folder) / "whole")
        same = content(Path(folder) / "run") == content(whole.run_dir)
    return same and summary["model_sha256"] == whole.summary["model_sha256"]


def survival(survived: bool) -> str:
    """The end of the page: what became of the killed run."""
    return f"""
## Never losing a run

A run of the digits (fedadam, plateau schedule, clients that evaluate), {12 * KILLS} rounds, killed with SIGKILL {KILLS} times and resumed
each time: model, best model, `metrics.csv`, `clients.csv` and the bytes in `ledger.csv` are {"" if survived else "not (missed) "}those of a run that was never killed.
"""


def main(path: str) -> int:
    """Measure every claim in full, write the table, and return 1 where one does not hold."""
    measured = {
        claim.name: measure(claim, range(claim.seeds), progress=lambda line: print(line, flush=True))
        for claim in CLAIMS
    }
    text, failed = table(measured)
    survived = survives(KILLS)
    failed += [] if survived else [f"{KILLS} kills"]
    Path(path).write_text(text + survival(survived))
    print(f"written: {path}" + (f"; missed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
