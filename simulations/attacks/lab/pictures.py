"""Plots of attacks: originals above what was recovered, ROC curves of membership, the matrix as a heat map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import roc_curve

from fedveil.simulations.attacks.lab.lab import Outcome
from fedveil.simulations.attacks.lab.scoring import matched
from fedveil.simulations.plots import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, MOST = 8, 32  # images on a sheet: across, and in all


def sheet(outcome: Outcome) -> bytes | None:
    """Draw a PNG of originals, what was recovered below each, and PSNR in dB; None where there are no images."""
    found = pairs(outcome)
    if not found:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(COLUMNS, len(found))
    down = -(-len(found) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2 * down, across, figsize=(0.8 * across, 1.85 * down), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for place, (original, recovered, decibels) in enumerate(found):
            row, column = divmod(place, across)
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            above.imshow(_picture(original), cmap="gray", vmin=0, vmax=1)
            if recovered is not None:
                below.imshow(_picture(recovered), cmap="gray", vmin=0, vmax=1)
            below.set_title("not found" if recovered is None else f"{decibels:.0f} dB", fontsize=7, y=-0.32)
        return to_png(figure)


def pairs(outcome: Outcome) -> list[tuple[np.ndarray, np.ndarray | None, float]]:
    """Return originals, what was recovered of each, and PSNR in dB, for the trials that are shown."""
    seen: list[tuple[np.ndarray, np.ndarray | None, float]] = []
    if outcome.recovers != "images" or outcome.refused:
        return seen
    for shown in outcome.shown:
        wanted, found = shown.trial.truth.examples.features, np.asarray(shown.found)
        for image, (index, decibels) in zip(wanted, matched(found, wanted), strict=True):
            seen.append((image, found[index] if index >= 0 else None, decibels))
    return seen[:MOST]


def _picture(image: np.ndarray) -> np.ndarray:
    """Return an image [channels, height, width] as Matplotlib takes it."""
    image = np.clip(image, 0, 1)
    return image[0] if image.ndim == 3 and image.shape[0] == 1 else np.moveaxis(image, 0, -1)


def thumbnail(image: np.ndarray) -> bytes:
    """Encode an image, [channels, height, width] in [0, 1], as a PNG of its size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((_picture(image) * 255).round().astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def roc(outcomes: Sequence[Outcome]) -> bytes | None:
    """Draw a PNG of the membership attacks' ROC curves, both axes logarithmic; None where there are none."""
    curves = [outcome for outcome in outcomes if outcome.recovers == "members" and not outcome.refused]
    if not curves:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 4.2))
        for colour, outcome in zip(COLOURS, curves, strict=False):
            members = np.concatenate([shown.trial.truth.members for shown in outcome.shown])
            scores = np.concatenate([np.asarray(shown.found) for shown in outcome.shown])
            false, true, _ = roc_curve(members, scores)
            axis.plot(np.maximum(false, 1e-4), np.maximum(true, 1e-4), color=colour, drawstyle="steps-post",
                      label=f"{outcome.attack}: AUC {outcome.mean()['auc']:.2f}")  # fmt: skip
        axis.plot([1e-4, 1], [1e-4, 1], color="0.6", linestyle=":", label="guessing")
        axis.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05))
        axis.set_xlabel("false positive rate")
        axis.set_ylabel("true positive rate")
        axis.legend(fontsize=8, loc="lower right")
        return to_png(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, words: Sequence[Sequence[str]]) -> bytes:
    """Draw a PNG of the matrix: 0 (guessing) is white, 1 (full recovery) is dark; `words` are written in the cells.

    values: float [rows, columns], NaN where there is no cell
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(1.9 + 0.98 * len(columns), 1.1 + 0.42 * len(rows)))
        axis.imshow(np.ma.masked_invalid(values), cmap="Reds", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=35, ha="left", fontsize=8)
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        for i, line in enumerate(words):
            for j, text in enumerate(line):
                dark = np.isfinite(values[i, j]) and values[i, j] > 0.6
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    options: dict[str, Any] = {"bbox_inches": "tight", "metadata": {"Software": None}}
    figure.savefig(buffer, format="png", **options)
    plt.close(figure)
    return buffer.getvalue()
