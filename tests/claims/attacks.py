"""What the attacks reach without protection, in full: `make claims` writes it down beside what is claimed of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import claims.fast_attacks as fast_attacks
import claims.slow_attacks as slow_attacks
import claims.sums as sums

SEEDS = (0, 1, 2)
LEAST: dict[str, float] = {
    **{f"words, mean-pool, batch {batch}, E = {epochs}: {score}": 1.0
       for epochs in (1, 5) for batch in (1, 8, 32) for score in ("recall", "precision")},
    **{f"words, mean-pool, batch 1, E = {epochs}: counted": 1.0 for epochs in (1, 5)},
    "words, LSTM, mean of states: recall": 0.95,
    **{f"words, LSTM, {pooling}: precision": 1.0 for pooling in ("mean of states", "last state")},
    **{f"words, {model}, weight decay: precision": 0.99
       for model in ("mean-pool", "LSTM, mean of states", "LSTM, last state")},
    "order, LSTM, last state: exact": 0.9,
    "first layer, fresh, batch 1: least dB": 100.0,
    "first layer, trained, batch 1: median dB": 100.0,
    "first layer, fresh, batch 8: share above 30 dB": 0.5,
    "first layer, mean of 8 clients: share above 60 dB": 0.5,
    "spear, fresh, batch 4: share above 60 dB": 0.8,
    **{f"labels, fresh, batch {batch}: exact": 1.0 for batch in (1, 8, 32)},
    "matching, batch 1: least dB": 30.0,
    "matching, batch 8: share above 20 dB": 0.9,
    "matching, batch 8, 5 epochs replayed: mean dB": 25.0,
    "DLG, sigmoid: least dB": 80.0,
    "imprint, 256 bins, batch 64: share above 30 dB": 0.7,
    "membership, loss: AUC": 0.75,
    "membership, lira: AUC": 0.85,
    "membership, coverage: AUC": 0.95,
    "imprint, sum of 8 clients of 8 images: share above 30 dB": 0.7,
    "two runs, one message: cosine": 0.999,
    "two runs, one image: cosine": 0.999,
    "two runs, 8 images in 4 steps: cosine": 0.999,
    "two runs, one message: words, F1": 0.99,
}  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """What was found of each figure, one number a seed, and how long it took."""

    rows: dict[str, list[float]]
    seconds: float

    @property
    def failed(self) -> list[str]:
        """Figures whose median is less than claimed, and claims without a figure."""
        missing = [name for name in LEAST if name not in self.rows]
        return missing + [
            name for name, least in LEAST.items() if name in self.rows and statistics.median(self.rows[name]) < least
        ]


def measure(progress: Callable[[str], None] = lambda _: None) -> Reached:
    """All figures, with all trials."""
    started = time.perf_counter()
    rows: dict[str, list[float]] = {}
    for module in (fast_attacks, slow_attacks, sums):
        rows |= module.full(SEEDS)
        progress(f"{module.__name__}: {len(rows)} figures after {time.perf_counter() - started:.0f} s")
    return Reached(rows, time.perf_counter() - started)


def section(found: Reached) -> str:
    """The section of docs/results.md."""
    lines = []
    for name, values in found.rows.items():
        least, middle = LEAST.get(name), statistics.median(values)
        claim = "" if least is None else f"at least {least:g}"
        missed = " (missed)" if least is not None and middle < least else ""
        lines.append(
            f"| {name} | {claim} | **{middle:.4g}**{missed} | {', '.join(f'{value:.4g}' for value in values)} |"
        )
    return f"""
## Attacks without protection, and on sums

What [the attacks](attacks.md) reach on MNIST and the SMS messages, the median over seeds {", ".join(map(str, SEEDS))}; a seed is 60 clients of one
example, 20 batches of the fast attacks, 12 of the slow ones, 5 clients of those on membership, 5 cohorts of 8 clients under secure
aggregation for what is read from a sum, or from two runs. Rows without a claim are what else was measured. {found.seconds / 60:.0f} minutes in all, on cores that other work shared.

| attack | claim | median | each seed |
|---|---|---|---|
{chr(10).join(lines)}
"""
