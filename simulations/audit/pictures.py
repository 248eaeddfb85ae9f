"""The picture of an audit: the canaries' scores, and what they allow to guess beside what the claim allows."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.simulations.audit.run import Audit
from fedveil.simulations.plots import COLOURS, STYLE

LEAST = 1e-3  # of the rates that are drawn
_POINTS = 200


def curves(found: Audit) -> bytes:
    """Draw a PNG: on the left the scores of canaries that are in and out, on the right how well their coins are guessed.

    The claim is a curve that true positives of a private run do not pass, but for chance.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [("in all rounds", found.steady, "-"), ("in odd rounds", found.turns, "--")]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8))
        scores, included = found.steady
        edges = np.histogram_bin_edges(scores, 60)
        for inside, colour in ((False, COLOURS[0]), (True, COLOURS[1])):
            left.hist(scores[included == inside], edges, color=colour, alpha=0.6, label="in" if inside else "out")
        left.set(xlabel="score, of canaries in all rounds", ylabel="canaries")
        left.locator_params(axis="x", nbins=5)
        left.legend(fontsize=8)
        rates = np.geomspace(LEAST, 1, _POINTS)
        right.fill_between(
            rates,
            allowed(found, rates),
            color="0.9",
            edgecolor="0.6",
            label=f"within the claim, epsilon {found.claim:.2f}",
        )
        for name, (scores, included), line in groups:
            if len(scores):
                false, true = rates_of(scores, included)
                right.plot(
                    np.maximum(false, LEAST), np.maximum(true, LEAST), color=COLOURS[1], linestyle=line, label=name
                )
        right.plot(rates, rates, color="0.6", linestyle=":", label="guessing")
        right.set(xscale="log", yscale="log", xlim=(LEAST, 1), ylim=(LEAST, 1.05))
        right.set(xlabel="out, and taken to be in", ylabel="in, and found")
        right.legend(fontsize=8, loc="lower right")
        figure.tight_layout()
        buffer = io.BytesIO()
        options: dict[str, Any] = {"metadata": {"Software": None}}
        figure.savefig(buffer, format="png", **options)
        plt.close(figure)
        return buffer.getvalue()


def rates_of(scores: np.ndarray, included: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of canaries above each score, of those that are out and of those that are in: float64 [m + 1]."""
    inside = included[np.argsort(-scores, kind="stable")]
    hits, misses = np.cumsum(inside), np.cumsum(~inside)
    start = np.zeros(1)
    return (
        np.concatenate([start, misses / max(misses[-1], 1)]),
        np.concatenate([start, hits / max(hits[-1], 1)]),
    )


def allowed(found: Audit, false: np.ndarray) -> np.ndarray:
    """Return the largest share of true positives at each share of false ones, under the claim: float64 like `false`.

    A Gaussian mechanism's curve where the claim is of one (Dong et al. 2022, equation 6); else the two lines of
    (epsilon, delta), min(e^epsilon x + delta, 1 - e^-epsilon (1 - delta - x)) (Kairouz et al. 2015, theorem 2.1).
    """
    if found.bound_gaussian is not None:
        from scipy.special import ndtr, ndtri

        curve: np.ndarray = ndtr(ndtri(false) + _mu(found.claim, found.delta))
        return curve
    grows = np.exp(min(found.claim, 50.0))
    lines: np.ndarray = np.minimum(grows * false + found.delta, 1 - (1 - found.delta - false) / grows)
    clipped: np.ndarray = np.clip(lines, 0, 1)
    return clipped


def _mu(epsilon: float, delta: float) -> float:
    """Return mu of the Gaussian mechanism with this epsilon at delta, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(1 / middle, 1, delta) < epsilon else (low, middle)
    return low
