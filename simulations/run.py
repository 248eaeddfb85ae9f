"""Run an experiment in this process, from Python or from the command line."""

from __future__ import annotations

import errno
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedveil.client.learning.runtime import Adversary, client_runtime
from fedveil.client.learning.witness import Witness
from fedveil.core.errors import FedveilError, Interrupted, SettingsError
from fedveil.core.record.record import Record, alone
from fedveil.core.record.resumes import note_resume
from fedveil.core.settings.experiment import Experiment, resumable
from fedveil.core.settings.keys import values
from fedveil.models.local.room import Room
from fedveil.models.parameters import from_numpy, get, load, to_numpy, without_constants
from fedveil.privacy.dp.banded import bands_of
from fedveil.server.checkpoint import MODEL, State, begun, load_state, put_back
from fedveil.server.exchange import Row
from fedveil.server.federation import Federation, federate, prepare, resolve
from fedveil.server.rounds.context import Hooks
from fedveil.server.rounds.observers import Observer
from fedveil.server.rounds.rows import CLIENT_COLUMNS
from fedveil.server.summary import summary
from fedveil.simulations.display import Display
from fedveil.simulations.engine.choice import choose, count_workers
from fedveil.simulations.engine.cohort import CohortGrid
from fedveil.simulations.engine.ray import run_on_ray
from fedveil.simulations.engine.states import DiskStates
from fedveil.simulations.engine.workers import Workers
from fedveil.simulations.holder import Holder, make_keys_once
from fedveil.simulations.result import Result

CLIENTS = "checkpoint/clients"  # in a record: what clients keep between rounds
ROOM = "checkpoint/gpu.json"  # in a record: how many clients a GPU trained at once


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    display: Display | None = None,
    command: Sequence[str] = (),
    start: Mapping[str, np.ndarray] | None = None,
    plots: bool = True,
    adversary: Adversary | None = None,
    observers: Sequence[Observer] = (),
) -> Result:
    """Run an experiment to its end, or resume the run in the folder `resume`.

    out: a new folder for the record; runs/NAME-TIMESTAMP without it
    display: shows progress; nothing is shown without it
    start: weights to begin with, float32 by name; those that the seed gives without it
    plots: draw them at the end
    adversary: sees and may change all contributions of a cohort after training, before they are transformed and protected;
        it is no setting, and a resumed run is given it again
    observers: see every message of an update and every round, as the server does, and change nothing
    Raises SettingsError and DataError before anything is written; TrainingError, Interrupted, and FedveilError where the
    disk is full, with every whole round kept in the record.

    >>> result = run(Experiment.preset("digits"))
    >>> float(result.metrics.test_accuracy.iloc[-1]) > 0.9
    True
    """
    if resume is not None and out is not None:
        raise SettingsError("a resumed run goes on in its own folder; give either `resume` or `out`")
    if resume is None:
        return _run(resolve(experiment), None, out, display, command, start, plots, adversary, observers)
    folder = Path(resume)
    recorded = _resumed(experiment, folder)
    with alone(folder):
        return _run(recorded, Record(folder), None, display, command, adversary=adversary, observers=observers)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    workers: int | None = None,
    display: Display | None = None,
    command: Sequence[str] = (),
) -> Result:
    """Resume the run in a folder with its recorded settings; a finished run gives its result again.

    rounds: the new number of rounds, above those that were done, for a finished run too. Rows and bytes are those of a
        run that had this number from the start, except that the old last round was evaluated
    workers: processes that compute
    Raises SettingsError where the run cannot go on, or where rounds were done and the learning rate depends on their
    number (`training.schedule` cosine); otherwise what `run` raises.
    """
    folder = Path(folder)
    experiment = _resumed(resumable(folder).override({"workers": workers}), folder)
    if rounds is not None:
        experiment = experiment.override({"federation.rounds": rounds})
    with alone(folder):
        return _run(experiment, Record(folder), None, display, command)


def _run(
    experiment: Experiment,
    earlier: Record | None,
    out: str | Path | None,
    display: Display | None,
    command: Sequence[str],
    start: Mapping[str, np.ndarray] | None = None,
    plots: bool = True,
    adversary: Adversary | None = None,
    observers: Sequence[Observer] = (),
) -> Result:
    """Run a resolved experiment; `earlier`: the record to resume, which only this process writes."""
    import pandas as pd

    from fedveil.simulations.plots import draw

    goes_on = earlier is not None and begun(earlier)
    with quiet_flower():
        federation = prepare(experiment, earlier if goes_on else None)
        if start is not None:
            federation.state.parameters = to_numpy(without_constants(federation.network, from_numpy(start)))
        engine, why = choose(federation)
    if adversary and engine == "ray":
        raise SettingsError(
            "engine = 'ray': computes one client at a time, and an adversary sees a cohort; use engine = 'auto'"
        )
    federation.experiment = federation.experiment.override({"engine": engine})
    if earlier and goes_on:
        _check_rounds(resumable(earlier.folder), federation, earlier.folder)
    dataset = federation.federated.dataset
    record = earlier or Record.create(federation.experiment, out, command, dataset.files)
    show = display or Display(None)
    try:
        with nullcontext() if earlier else alone(record.folder):
            if goes_on:
                put_back(record, federation.state)
            if earlier and federation.state.round < experiment.federation.rounds and not federation.state.stopped:
                note_resume(earlier, experiment, federation.state.round, command)
            if dataset.scaling and not record.path("scaling.json").exists():
                record.write("scaling.json", dataset.scaling.dump(dataset.columns))
            keys = make_keys_once(federation, record)
            federation.protect(keys / "server" if keys else None)
            with quiet_flower(), _stop_on_interrupt() as stopped:
                _compute(federation, record, show, why, stopped.is_set, str(keys or ""), adversary, observers)
            if plots:
                draw(federation, record)
    except (Interrupted, KeyboardInterrupt):
        done = _rounds_kept(record)
        raise Interrupted(
            f"in round {done + 1}; rounds up to {done} are kept in {record.folder}\n"
            f"  go on with: fedveil resume {record.folder}"
        ) from None
    except OSError as error:
        if record.folder not in Path(error.filename or "").parents:
            raise  # it is not about a file of the record
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FedveilError(
            f"{error.filename} cannot be written: {error.strerror or error}\n"
            f"  rounds up to {_rounds_kept(record)} are kept in {record.folder}\n"
            f"  {'make room, and ' if full else ''}go on with: fedveil resume {record.folder}"
        ) from error

    load(federation.network, from_numpy(load_file(record.path(MODEL))))
    metrics, clients = pd.read_csv(record.path("metrics.csv")), record.path("clients.csv")
    return Result(
        run_dir=record.folder,
        metrics=metrics,
        # there are no rows where every round drew nobody
        clients=pd.read_csv(clients) if clients.exists() else pd.DataFrame(columns=CLIENT_COLUMNS),
        model=federation.network.cpu().eval(),
        summary=summary(federation, record),
    )


def _compute(
    federation: Federation,
    record: Record,
    show: Display,
    why: str,
    stop: Callable[[], bool],
    keys: str,
    adversary: Adversary | None,
    observers: Sequence[Observer],
) -> None:
    """Run the remaining rounds on the experiment's engine; `keys`: the folder of the run's keys, empty without any."""
    experiment = federation.experiment
    settings = experiment.toml()
    here = federation.protection is not None and experiment.engine != "ray"
    witness = Witness() if here else None
    states = DiskStates(record.path(CLIENTS), federation.state.client_index)
    federation.state.clients = states
    room = Room(record.path(ROOM))
    runtime = client_runtime(settings, keys, states=states, witness=witness, adversary=adversary, room=room)
    holder = Holder(federation, record, runtime.homomorphic(0), witness)
    if federation.protection is not None:
        holder.describe()
        holder.put_back(federation.state)

    def watch(row: Row, state: State) -> None:
        holder.write(state)
        show.round_done(row, state)

    hooks = Hooks(watch, holder.evaluate, show.warn, holder.inspect if here else None, observers=observers)
    if experiment.engine == "ray":
        with show.live(federation, record, f"Flower's simulation runtime, which takes several seconds to start: {why}"):
            run_on_ray(federation, record, hooks, runtime, stop=stop, client_done=show.client_done)
        return
    cohort = experiment.federation.cohort
    number = min(count_workers(experiment, federation.device.type), cohort)
    parameters = to_numpy(get(federation.network))
    with closing(Workers(runtime, parameters, cohort, number, stop)) as workers:
        count = workers.processes
        words = "1 process" if count == 1 else f"{count} processes"
        words = "one client after another" if experiment.engine == "sequential" else words
        if count < number:
            why += "; more cannot train, as this process has trained before, beside a GPU that PyTorch sees"
        with show.live(federation, record, f"{words}: {why}"):
            grid = CohortGrid(runtime, workers, {"experiment": settings, "keys": keys}, watch=show.client_done)
            federate(federation, grid, record, hooks)


def _resumed(experiment: Experiment, folder: Path) -> Experiment:
    """Return the recorded experiment, which must be the one given; raise SettingsError where it cannot go on."""
    recorded = resumable(folder)
    computing = {key: getattr(recorded, key) for key in ("engine", "device") if getattr(experiment, key) == "auto"}
    asked = experiment.override(computing)
    old, new = values(recorded), values(asked)
    changed = [key for key in {**old, **new} if key != "workers" and old.get(key) != new.get(key)]
    if changed:
        raise SettingsError(
            f"fedveil resume {folder}: holds another experiment ({', '.join(changed)}); a run goes on with its own settings"
        )
    try:
        return resolve(recorded).override({"workers": asked.workers})
    except SettingsError as error:
        raise SettingsError(
            f"fedveil resume {folder}: this machine cannot compute as that run did ({error}); go on where it began, or start a new run"
        ) from None


def _check_rounds(recorded: Experiment, federation: Federation, folder: Path) -> None:
    """Raise SettingsError where the number of rounds of a started run cannot be changed as asked."""
    state, rounds = federation.state, federation.experiment.federation.rounds
    asked = f"fedveil resume {folder} --rounds {rounds}"
    if rounds == recorded.federation.rounds or not state.round:
        return
    if rounds <= state.round:
        raise SettingsError(f"{asked}: {state.round} rounds are done already; name more than that")
    if state.stopped:
        raise SettingsError(
            f"{asked}: the run ended by itself ({state.stopped}), and its settings would end it again; start a new run "
            "without federation.target_accuracy and federation.patience, or with a larger privacy.epsilon"
        )
    if _bands(recorded, recorded.federation.rounds) != _bands(recorded, rounds):
        raise SettingsError(
            f"{asked}: privacy.noise = 'banded' took back the noise of so many rounds as the run was to have, "
            f"{recorded.federation.rounds}, and epsilon does not hold where that changes; start a new run"
        )
    if recorded.training.schedule == "cosine":
        raise SettingsError(
            f"{asked}: training.schedule = 'cosine' spread the learning rate over {recorded.federation.rounds} rounds, and "
            f"{state.round} were done with it; start a new run"
        )


def _bands(experiment: Experiment, rounds: int) -> int:
    """Return the rounds whose noise a run of so many rounds takes back; 0 where it takes back none."""
    if experiment.privacy.noise != "banded":
        return 0
    return bands_of(experiment.data.clients, experiment.federation.cohort, rounds)


def _rounds_kept(record: Record) -> int:
    """Return the round of the last whole checkpoint, as a run may be stopped while it writes a newer one."""
    return load_state(record)[0].round if begun(record) else 0


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Log only Flower's errors within the block, as the record and the display tell the steps of each round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C, or SIGTERM of a batch system, sets; the second ends the run at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: Any) -> None:
        stopped.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
