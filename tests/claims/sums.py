"""What attacks reach under secure aggregation, where a server sees sums alone; a trial in `make test`, all in `make claims`.

Unlike the other attacks' figures these are of whole runs, through messages, masks and grid, as `fedveil attack` makes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedveil import Experiment
from fedveil.simulations.attacks.lab.lab import Outcome, attack
from fedveil.simulations.attacks.lab.trials import Room

EIGHT = {"training.epochs": 1, "data.client_examples": 8}
ONE_STEP = {**EIGHT, "training.batch_size": "full"}
FOUR_STEPS = {**EIGHT, "training.batch_size": 2}


def under_sums(
    name: str, preset: str, seed: int, observer: str, trials: int, room: Room | None = None, **settings: Any
) -> Outcome:
    """An attack on cohorts of 8 clients under secure aggregation; `room`: where runs lie that other attacks look at too."""
    experiment = Experiment.preset(preset).override({"privacy.protection": "secagg", "seed": seed, **settings})
    return attack(name, experiment, observer=observer, trials=trials, asked=frozenset(settings), room=room)


def imprint(seed: int, trials: int) -> Outcome:
    """A made-up model for 8 clients of 8 images, one step each, and their sum."""
    bins = {"model.hidden": [256, 64]}
    return under_sums("imprint", "mnist-mlp", seed, "malicious-aggregate", trials, **ONE_STEP, **bins)


def of_two_runs(observer: str, seed: int, trials: int) -> dict[str, float]:
    """What the sums of two runs tell of the client that the second lacks."""
    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder))
        message = under_sums("differencing", "sms-lstm", seed, observer, trials, room)
        words = under_sums("words", "sms-lstm", seed, observer, trials, room)
        image = under_sums("differencing", "mnist-mlp", seed, observer, trials, room)
        images = under_sums("differencing", "mnist-mlp", seed, observer, trials, room, **FOUR_STEPS)
    return {
        "one message: cosine": message.mean()["cosine"],
        "one message, of the whole cohort: cosine": message.mean(baseline=True)["cosine"],
        "one message: words, F1": words.mean()["f1"],
        "one image: cosine": image.mean()["cosine"],
        "8 images in 4 steps: cosine": images.mean()["cosine"],
        "8 images in 4 steps, of the whole cohort: cosine": images.mean(baseline=True)["cosine"],
    }


def full(seeds: Sequence[int] = (0, 1, 2), trials: int = 5) -> dict[str, list[float]]:
    """Every figure, one a seed."""
    rows: dict[str, list[float]] = {}
    for seed in seeds:
        found = imprint(seed, trials).mean()
        read = {"share above 30 dB": found["above_30"], "median dB": found["median"]}
        figures = {f"imprint, sum of 8 clients of 8 images: {what}": value for what, value in read.items()}
        for observer, runs in (("two-runs", "two runs"), ("two-deployed-runs", "two deployed runs")):
            figures |= {f"{runs}, {what}": value for what, value in of_two_runs(observer, seed, trials).items()}
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    return rows
