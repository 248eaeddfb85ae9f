"""A job on the installed version of FedVeil: `python any_fedveil.py JOB_AS_JSON SETTINGS_AS_JSON STARTED`.

It uses only names of 0.1.0, so that the same script runs on two versions. The settings are written in the keys of
0.1.0, which later versions read from a file. Prints a JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np

import fedveil
from fedveil.core.examples import Examples, Task
from fedveil.datasets.dataset import DataSet
from fedveil.simulations.display import Display

PIXELS, CLASSES, VOCABULARY, TOKENS, EMBEDDING, UNITS = (1, 28, 28), tuple("0123456789"), 4000, 32, 32, 64


def examples(*_settings: Any) -> DataSet:
    """Make the job's random examples, as `benchmarks/data.py` does; they are the same in every version."""
    job, rng = json.loads(sys.argv[1]), np.random.default_rng(0)

    def part(n: int) -> Examples:
        if job["model"] == "mlp":
            return Examples(rng.random((n, *PIXELS), dtype=np.float32), rng.integers(0, len(CLASSES), n))
        return Examples(rng.integers(1, VOCABULARY, (n, TOKENS), dtype=np.int32), rng.integers(0, 2, n))

    task = Task("images", PIXELS, CLASSES)
    if job["model"] == "lstm":
        task = Task("text", (TOKENS,), ("ham", "spam"), VOCABULARY)
    return DataSet("random", task, part(job["population"] * job["examples"]), part(64), made_up=True)


class Clock(Display):
    """A display that notes when each round was done, recorded and checkpointed."""

    def __init__(self) -> None:
        super().__init__(None)
        self.ends: list[float] = []

    def round_done(self, *shown: Any) -> None:
        """Note the end of a round."""
        super().round_done(*shown)
        self.ends.append(time.time())


def settings_of(job: dict[str, Any]) -> str:
    """Write the job as a settings file of 0.1.0, with one more round, which evaluates and is not counted."""
    rounds = job["rounds"] + 1
    model = "hidden = [64, 64]" if job["model"] == "mlp" else f"embedding = {EMBEDDING}\nunits = {UNITS}"
    return f"""
        name = "{job["name"]}"
        [data]
        dataset = "any_fedveil:examples"
        clients = {job["population"]}
        [model]
        name = "{job["model"]}"
        {model}
        [training]
        epochs = 1
        batch_size = {job["batch_size"]}
        learning_rate = 0.1
        [federation]
        rounds = {rounds}
        cohort = {job["cohort"]}
        [evaluation]
        every = {rounds}
    """


def main(job: dict[str, Any], settings: dict[str, Any], started: float) -> None:
    """Run the job and print its figures."""
    experiment = fedveil.Experiment.parse(settings_of(job)).override(settings)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        result = fedveil.run(experiment, out=Path(folder) / "run", display=clock)
    print(json.dumps({
        "first_round_s": clock.ends[1] - started,
        "round_s": [after - before for before, after in pairwise(clock.ends[1:-1])],
        "model_sha256": result.summary["model_sha256"],
        "engine": result.summary["engine"],
        "version": fedveil.__version__,
        "installed": str(Path(fedveil.__file__).parent),
    }))  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
