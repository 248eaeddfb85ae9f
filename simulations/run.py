"""Run an experiment in this process, from Python or from the command line."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedveil.client.app import app
from fedveil.client.work import forget
from fedveil.core.errors import Interrupted, SettingsError
from fedveil.core.experiment import Experiment
from fedveil.core.record import Record
from fedveil.models.parameters import from_numpy, load
from fedveil.server.federation import Federation, federate, prepare, resolve
from fedveil.simulations.display import Display
from fedveil.simulations.engine.grid import InProcessGrid

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """What a run made.

    run_dir: the folder of the record
    metrics: a row a round, as in metrics.csv; clients: a row a client a round
    model: the trained network, in evaluation mode, on the CPU
    summary: what `fedveil run --json` prints
    """

    run_dir: Path
    metrics: pd.DataFrame
    clients: pd.DataFrame
    model: nn.Module
    summary: dict[str, Any]


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    display: Display | None = None,
    command: Sequence[str] = (),
) -> Result:
    """Run an experiment to its end, or go on with the one in the folder `resume`.

    out: a new folder for the record; runs/NAME-TIMESTAMP without it
    display: shows progress; nothing is shown without it
    Raises SettingsError and DataError before anything is written; TrainingError and Interrupted with every whole
    round kept in the record.

    >>> result = run(Experiment.preset("digits"))
    >>> float(result.metrics.test_accuracy.iloc[-1]) > 0.9
    True
    """
    import pandas as pd

    if resume is not None and out is not None:
        raise SettingsError("a resumed run goes on in its own folder; give either `resume` or `out`")
    experiment = resolve(experiment)
    forget()
    record = Record(Path(resume)) if resume is not None else None
    with _quiet_flower():
        federation = prepare(experiment, record)
    if record is None:
        record = Record.create(experiment, out, command)
    else:
        record.cut(federation.state.round)
    show = display or Display(None)
    try:
        with _quiet_flower(), _stop_on_interrupt() as stopped, show.live(federation, record):
            grid = InProcessGrid(
                app,
                experiment.data.clients,
                {"experiment": experiment.toml()},
                stop=stopped.is_set,
                watch=show.client_done,
            )
            federate(federation, grid, record, show.round_done)
    except (Interrupted, KeyboardInterrupt):
        done = federation.state.round
        raise Interrupted(
            f"in round {done + 1}; rounds up to {done} are kept in {record.folder}\n"
            f"  go on with: fedveil run --resume {record.folder}"
        ) from None
    finally:
        forget()

    from fedveil.simulations.plots import draw

    draw(federation, record)
    load(federation.network, from_numpy(federation.state.parameters))
    metrics = pd.read_csv(record.path("metrics.csv"))
    return Result(
        run_dir=record.folder,
        metrics=metrics,
        clients=pd.read_csv(record.path("clients.csv")),
        model=federation.network.cpu().eval(),
        summary=_summary(federation, metrics, record),
    )


def _summary(federation: Federation, metrics: pd.DataFrame, record: Record) -> dict[str, Any]:
    """What `fedveil run --json` prints: the last row of the metrics, and what a script may rely on."""
    state, last = federation.state, metrics.iloc[-1]
    scores = {
        name: None if math.isnan(last[name]) else float(last[name])
        for name in metrics.columns
        if name.startswith(("test_", "validation_"))
    }
    return {
        "run_dir": str(record.folder),
        "rounds": state.round,
        **scores,
        "best_round": state.best_round,
        "stopped": state.stopped or None,
        "seconds": round(state.seconds, 3),
        "model_sha256": record.sha256("model.safetensors"),
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "engine": federation.experiment.engine,
        "device": federation.device.type,
        "protection": federation.experiment.privacy.protection,
    }


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs each step of each round; the record and the display say the same."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C asks the run to stop after the message in flight; the second stops it at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
