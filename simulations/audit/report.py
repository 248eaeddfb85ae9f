"""The report on an audit: its words, one self-contained HTML file, the picture as PNG and the numbers as JSON."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import datetime
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np

from fedveil.core.errors import SettingsError
from fedveil.core.record.record import write_atomically
from fedveil.simulations.audit.pictures import curves
from fedveil.simulations.audit.run import CONFIDENCE, Audit

PAGE, PICTURE, NUMBERS, SCORES = "report.html", "curves.png", "audit.json", "scores.npz"
LIMITS = (
    "A claim that is not refuted is not proven. One run of canaries shows a part of what a run gives away, by design: of "
    "a right run about half its epsilon. Audit small claims, below 3 say: from about 7 on noise of half the size passes.",
    "Only what these canaries meet is tested: this clip, this noise and this sum, in a simulation whose noise comes from "
    "the seed. Noise from the operating system's generator, a client that adds none, the bits of floating-point numbers, and "
    "whatever is told beside updates are not.",
    "Noise that misses a few numbers of the model, a bias say, hardly shows in any canary.",
    "Where clients are sampled, noise of half the size shows in the estimate alone.",
)


def new_folder(out: Path | None, name: str) -> Path:
    """Return the folder for an audit; raise SettingsError where it exists already."""
    folder = out or Path("audits") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise SettingsError(f"--out {folder}: exists already; name a new folder")
    return folder


def rows(found: Audit) -> list[tuple[str, str, str]]:
    """Return the numbers of an audit with their names and meanings, in the order in which they are read."""
    sure = f"at least this, with {CONFIDENCE:.0%} confidence"
    lines = [
        ("claim", found.claim, f"epsilon at delta {found.delta:g}, {found.against}"),
        ("bound", found.bound, f"{sure} (Steinke et al. 2023)"),
    ]
    if found.bound_gaussian is not None:
        lines.append(("bound, Gaussian curve", found.bound_gaussian, f"{sure} (Mahloujifar et al. 2024)"))
    if found.estimate is not None:
        lines.append(("estimate", found.estimate, "about this, without proof (Andrew et al. 2023)"))
    if found.estimate_turns is not None:
        lines.append(("estimate, turns", found.estimate_turns, "the same from canaries in odd rounds, less even ones"))
    return [(name, f"{value:.2f}", words) for name, value, words in lines]


def write_report(folder: Path, found: Audit) -> Path:
    """Write an audit's page, picture, numbers and scores into its folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = curves(found)
    text = resources.files("fedveil.simulations.audit").joinpath(PAGE).read_text("utf-8")
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(text)
        .render(
            title=f"Audit of {found.experiment.name}",
            version=version("fedveil"),
            date=f"{datetime.now():%Y-%m-%d}",
            refuted=found.refuted,
            verdict=f"The claim is {found.verdict}.",
            rows=[*rows(found), ("canaries", f"{found.canaries:,}", "each in or out by a coin")],
            picture=b64encode(picture).decode(),
            limits=LIMITS,
            settings=found.experiment.toml(),
        )
    )
    path = folder / PAGE
    write_atomically(folder / PICTURE, picture)
    write_atomically(path, page.encode())
    write_atomically(folder / NUMBERS, json.dumps(found.summary(), indent=1).encode() + b"\n")
    with open(folder / SCORES, "wb") as file:
        np.savez_compressed(
            file, steady=found.steady[0], steady_in=found.steady[1], turns=found.turns[0], turns_in=found.turns[1]
        )
    return path
