"""The report on attacks: one self-contained HTML file, with its pictures as PNG and its scores as JSON beside it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from rich.text import Text

from fedveil.core.catalog import ATTACKS
from fedveil.core.errors import SettingsError
from fedveil.core.record.record import write_atomically
from fedveil.simulations.attacks.lab.display import FOUND, LABEL, MISSED, WRONG, lines, named
from fedveil.simulations.attacks.lab.lab import Outcome
from fedveil.simulations.attacks.lab.observers import OBSERVERS
from fedveil.simulations.attacks.lab.pictures import pairs, roc, sheet, thumbnail

CLASSES = {FOUND: "found", MISSED: "missed", WRONG: "wrong"}
PAGE = "report.html"


def new_folder(out: Path | None, name: str) -> Path:
    """Return the folder for a report; raise SettingsError where it exists already."""
    folder = out or Path("attacks") / f"{name.rpartition(':')[2]}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise SettingsError(f"--out {folder}: exists already; name a new folder")
    return folder


def write_report(
    folder: Path, outcomes: Sequence[Outcome], matrix: bytes | None = None, budgets: bytes | None = None
) -> Path:
    """Write the page, its pictures and its scores into a new folder; return the page's path.

    matrix: the picture of the matrix that these outcomes belong to; budgets: of what its budgets cost and buy
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"membership": roc(outcomes), "matrix": matrix, "budgets": budgets}
    shown = []
    for outcome in outcomes:
        pictures[outcome.attack] = sheet(outcome)
        shown.append(_shown(outcome))
    for name, content in pictures.items():
        if content is not None:
            write_atomically(folder / f"{name.rpartition(':')[2]}.png", content)
    text = resources.files("fedveil.simulations.attacks.lab").joinpath(PAGE).read_text("utf-8")
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(text)
        .render(
            title="Attacks on " + ", ".join(dict.fromkeys(outcome.experiment.name for outcome in outcomes)),
            version=version("fedveil"),
            date=f"{datetime.now():%Y-%m-%d}",
            made_up=all(outcome.experiment.data.dataset.name in ("spam-demo", "synthetic") for outcome in outcomes),
            matrix=_embedded(matrix),
            budgets=_embedded(budgets),
            roc=_embedded(pictures["membership"]),
            outcomes=shown,
        )
    )
    path = folder / PAGE
    write_atomically(path, page.encode())
    write_atomically(folder / "scores.json", json.dumps([outcome.summary() for outcome in outcomes], indent=1).encode())
    return path


def _embedded(picture: bytes | None) -> str:
    return "" if picture is None else b64encode(picture).decode()


def _shown(outcome: Outcome) -> dict[str, Any]:
    """Return what the page says of one attack, as values for the template."""
    reached, guessed = outcome.mean(), outcome.mean(baseline=True)
    texts: list[list[tuple[str, list[tuple[str, str]]]]] = []
    if outcome.recovers in ("words", "sentence") and not outcome.refused:
        texts = [[_labelled(line) for line in lines(outcome.recovers, shown)] for shown in outcome.shown]
    protection = outcome.experiment.privacy.protection.name
    return {
        "attack": outcome.attack,
        "under": "" if protection == "none" else protection,
        "knows": f"Seen by {OBSERVERS[outcome.observer].knows}.",
        "description": ATTACKS.get(outcome.attack, "") or "",
        "refused": outcome.refused,
        "warning": outcome.warning,
        "pairs": [
            (
                _embedded(thumbnail(image)),
                _embedded(thumbnail(found)) if found is not None else "",
                f"{decibels:.0f} dB",
            )
            for image, found, decibels in pairs(outcome)
        ],
        "texts": texts,
        "ordered": outcome.recovers == "sentence",
        "trials": len(outcome.scores),
        "scores": [(named(name), f"{value:.3f}", f"{guessed[name]:.3f}") for name, value in reached.items()],
        "conclusion": conclusion(outcome),
    }


def _labelled(line: Text) -> tuple[str, list[tuple[str, str]]]:
    """Return a line's label, and its pieces with the class of each: what was read, and what was not, is never one line."""
    pieces = [(line.plain[span.start : span.end].strip(), CLASSES.get(str(span.style), "")) for span in line.spans]
    return line.plain[:LABEL].strip(), pieces or [(line.plain[LABEL:], "")]


def conclusion(outcome: Outcome) -> str:
    """Say what the scores show, and what they do not show."""
    reached, guessed = outcome.mean()[outcome.metric], outcome.mean(baseline=True)[outcome.metric]
    name = named(outcome.metric)
    if outcome.refused:
        return (
            f"This observer could not run this attack: guessing gives {name} {guessed:.2f}. That says nothing about other "
            "observers: try --observer aggregate and --observer key-holder."
        )
    if reached <= guessed * 1.05 + 1e-9:
        return (
            f"{name} {reached:.2f} is no better than guessing ({guessed:.2f}). That one attack fails here does not show that nothing "
            "leaks: another one, or more rounds, may do better."
        )
    return (
        f"{name} {reached:.2f}, where guessing gives {guessed:.2f}: this much is out under these settings and for this observer. It "
        "holds for this batch size, model and optimiser; other settings need a measurement of their own."
    )
