"""One measured run of an experiment through FedVeil's public path, in a separate process.

`python -m benchmarks.one_run [--stages] STARTED < experiment.toml` prints a JSON line. STARTED is the `time.time()` of
the process' start, so that imports count for the first round.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_mb
from benchmarks.stages import NAMES, StageClock
from fedveil import __version__
from fedveil.core.settings.experiment import Experiment
from fedveil.server.checkpoint import State
from fedveil.server.exchange import Row
from fedveil.simulations.display import Display
from fedveil.simulations.run import run


class RoundClock(Display):
    """A display that notes when each round was done, recorded and checkpointed, and its seconds in each stage."""

    def __init__(self, stages: StageClock | None, rounds: int) -> None:
        super().__init__(None)
        self.ends: list[float] = []  # round 0, the start, first
        self.stages: list[dict[str, float]] = []
        self.memory_mb = 0.0
        self._stages, self._last = stages, rounds

    def round_done(self, row: Row, state: State) -> None:
        """Note the end of a round."""
        super().round_done(row, state)
        self.ends.append(time.time())
        if self._stages is not None:
            self.stages.append(self._stages.take())
        if state.round == self._last:
            self.memory_mb = peak_mb()  # the peak of the whole run; the time to read it counts for no round


def measure(experiment: Experiment, started: float, *, stages: bool = False) -> dict[str, Any]:
    """Measure an experiment of at least 3 rounds; its first round and its last, which evaluates, are not in `round_s`.

    started: the `time.time()` of the process' start
    stages: measure the seconds of each stage as well, over the rounds in `round_s`, which costs a little time
    """
    stage_clock = StageClock() if stages else None
    if stage_clock is not None:
        stage_clock.install()
    clock = RoundClock(stage_clock, experiment.federation.rounds)
    with tempfile.TemporaryDirectory() as folder:
        result = run(experiment, out=Path(folder) / "run", display=clock)
    ends = clock.ends
    found: dict[str, Any] = {
        "first_round_s": ends[1] - started,
        "round_s": [after - before for before, after in pairwise(ends[1:-1])],
        "memory_mb": clock.memory_mb,
        "model_sha256": result.summary["model_sha256"],
        "engine": result.summary["engine"],
        "version": __version__,
    }
    if stages:
        counted = clock.stages[2:-1]
        found["stages_s"] = {name: sum(times[name] for times in counted) for name in NAMES}
    return found


def main() -> None:
    """Run the experiment on standard input and print its figures."""
    *options, started = sys.argv[1:]
    experiment = Experiment.parse(sys.stdin.read())
    print(json.dumps(measure(experiment, float(started), stages="--stages" in options)))


if __name__ == "__main__":
    main()
