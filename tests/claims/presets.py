"""What FedVeil claims to reach, as data: `make test` checks each with fewer seeds, `make claims` with all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedveil import Experiment, Result, run


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


@dataclass(frozen=True)
class Measured:
    """One run: the claim's number, seconds of the whole, and what its protection cost (`privacy` in the run's summary)."""

    value: float
    seconds: float
    costs: dict[str, Any]


def measure(
    claim: Claim,
    seeds: Sequence[int],
    *,
    protection: str | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """A run of the claim's experiment for each seed; `protection`: None for the preset's own."""
    found: list[Measured] = []
    settings = {**claim.settings, **(claim.quick if quick else {})}
    if protection is not None:
        settings["privacy.protection"] = protection
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            experiment = Experiment.preset(claim.preset).override({**settings, "seed": seed})
            started = time.perf_counter()
            result = run(experiment, out=Path(folder) / "run")
            seconds = time.perf_counter() - started
            found.append(Measured(claim.measure(result), seconds, result.summary.get("privacy", {})))
        progress(
            f"{claim.name}, {protection or 'as it is'}: seed {seed}: {claim.what} {found[-1].value:.4g} in {seconds:.1f} s"
        )
    return found
