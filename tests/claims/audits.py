"""What audits find: right runs, and faults planted in the functions that clip and add noise; a few in `make test`, all in `make claims`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import fedveil.client.learning.transforms as transforms
import fedveil.privacy.defences as defences
import fedveil.server.rounds.training as rounds
from fedveil import Experiment
from fedveil.privacy.dp.noise import add_noise
from fedveil.server.protection.noise import NoisySum
from fedveil.simulations.audit.run import USUAL, Audit, audit

RIGHT, SEEDS, CANARIES = 20, 3, 4000  # runs without a fault, and with each
ALL = {**USUAL, "federation.cohort": 10}


def _changed(**changes: Callable[[float], float]) -> AbstractContextManager[Any]:
    """Change what becomes of a round's sum: its bound, or the deviation of its noise."""
    right = rounds.noisy_sum

    def wrong(*given: Any, **options: Any) -> NoisySum | None:
        found = right(*given, **options)
        return found and replace(found, **{name: change(getattr(found, name)) for name, change in changes.items()})

    return patch.object(rounds, "noisy_sum", wrong)


@contextmanager
def halved() -> Iterator[None]:
    """Half the noise, of the server and of clients."""

    def half(update: Any, deviation: float, normal: Any) -> Any:
        return add_noise(update, deviation / 2, normal)

    with _changed(deviation=lambda deviation: deviation / 2), patch.object(defences, "add_noise", half):
        yield


@contextmanager
def unclipped() -> Iterator[None]:
    """No clip, neither by clients nor by the server."""
    with (
        _changed(bound=lambda _bound: math.inf),
        patch.object(
            transforms, "clip_rows", lambda _given, weights, _bound: np.zeros(len(next(iter(weights.values()))))
        ),
        patch.object(defences, "clip", lambda update, _bound: {k: np.float64(v) for k, v in update.items()}),
    ):
        yield


@contextmanager
def reused() -> Iterator[None]:
    """The server's noise of the first round in every round."""
    right = rounds.noisy_sum
    with patch.object(rounds, "noisy_sum", lambda asked, _number, *rest, **options: right(asked, 1, *rest, **options)):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "noise halved": halved, "no clip": unclipped, "noise used twice": reused
}  # fmt: skip


@dataclass(frozen=True)
class Audited:
    """The audits of one fault, or of none."""

    fault: str
    found: list[Audit]

    @property
    def holds(self) -> bool:
        """Whether every run with the fault is refuted, and none without."""
        return all(each.refuted == bool(self.fault) for each in self.found)


def audited(seed: int, canaries: int = CANARIES, **settings: Any) -> Audit:
    """The audit of digits with a claim of 2.75."""
    experiment = Experiment.preset("digits").override({**ALL, "seed": seed, **settings})
    with tempfile.TemporaryDirectory() as folder:
        return audit(experiment, Path(folder) / "run", canaries=canaries)


def measure(progress: Callable[[str], None] = lambda _line: None) -> list[Audited]:
    """Audit right runs, and runs with each fault."""
    measured = []
    for fault, number in {"": RIGHT, **dict.fromkeys(FAULTS, SEEDS)}.items():
        found = []
        for seed in range(number):
            with FAULTS[fault]() if fault else nullcontext():
                found.append(audited(seed))
            progress(f"audit, {fault or 'right'}, seed {seed}: {found[-1].verdict}")
        measured.append(Audited(fault, found))
    return measured


def section(measured: list[Audited]) -> str:
    """The section on audits."""
    rows = "\n".join(
        f"| {each.fault or 'right'} | {len(each.found)} | {_range(each, 'bound')} | {_range(each, 'bound_gaussian')} | "
        f"{_range(each, 'estimate')} | {_range(each, 'estimate_turns')} | {sum(a.refuted for a in each.found)}"
        f"{'' if each.holds else ' (missed)'} |"
        for each in measured
    )
    return f"""
## Audits

`fedveil audit` of the digits, claimed epsilon {measured[0].found[0].claim:.2f}, {CANARIES:,} canaries; faults are planted in the functions that clip
and add noise ([auditing.md](auditing.md)). Claimed is that no right run is refuted, and every other one is.

| | runs | bound | bound, Gaussian curve | estimate | estimate, turns | refuted |
|---|---|---|---|---|---|---|
{rows}
"""


def _range(measured: Audited, name: str) -> str:
    values = [getattr(each, name) for each in measured.found]
    least, most = min(values), max(values)
    return f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
