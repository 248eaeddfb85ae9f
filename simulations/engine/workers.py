"""The execution of jobs: in this process, or in worker processes that share its data and weights.

Workers are forked after the data is loaded, so that they see it without a copy. The model of a round and the clients'
weights lie in shared memory, and only a few numbers of each job go through the pipes. Every process computes with one
thread, and what a job computes does not depend on the process.
"""

from __future__ import annotations

import gc
import math
import mmap
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.local import score
from fedveil.client.learning.pipeline import compute, steps_of
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.errors import DataError, FedveilError, Interrupted, SettingsError, TrainingError
from fedveil.core.metrics import Scores
from fedveil.core.places import where
from fedveil.simulations.engine.forks import children_train

Arrays = dict[str, np.ndarray]
FROZEN_FROM_START = 1000  # objects, at most: some versions of Python 3.12 count 375 of their own as frozen


@dataclass(frozen=True)
class Job:
    """The work that one process does at a time: some steps for a chunk of clients, or their evaluation.

    contributions: those of the chunk, without their arrays
    first: the row of the shared results that holds the first client's weights; the other clients' follow
    steps: the first of the runtime's steps to do, and the one after the last; None to evaluate
    """

    contributions: Contributions
    first: int = 0
    steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a job, and the seconds it took.

    contributions: after the steps, without their arrays; scores: of evaluation, one for each client
    """

    seconds: float
    contributions: Contributions | None = None
    scores: Sequence[Scores] = ()


class Workers:
    """The runner of jobs, in this process or in `number` processes where that is more than one.

    Where PyTorch forbids processes to train (`forks.py`), all jobs run in this one, to the same bytes.

    results: the clients' weights, each [rows, ...]; row `job.first + i` is that of the i-th client of a job. Later jobs
        overwrite them, except where their arrays are still in use: see `make_room`.
    """

    def __init__(
        self, runtime: ClientRuntime, like: Mapping[str, np.ndarray], rows: int, number: int, stop: Callable[[], bool]
    ) -> None:
        """`like`: arrays of the model's shapes; `rows`: how many clients' weights fit; `stop`: asked while jobs run."""
        self._runtime, self._rows, self._number, self._stop = runtime, rows, number, stop
        self._shapes = {name: array.shape for name, array in like.items()}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._begin()

    def _begin(self) -> None:
        shared = self._number > 1 and children_train()
        self._froze = gc.get_freeze_count() <= FROZEN_FROM_START  # else others froze more, which stays frozen
        given, self._flat = (_memory(self._shapes, rows, shared) for rows in (1, self._rows))
        self._given = {name: flat.reshape(self._shapes[name]) for name, flat in given.items()}
        self.results = {name: flat.reshape(self._rows, *self._shapes[name]) for name, flat in self._flat.items()}
        self._unheld = self._references()
        gc.collect()
        if self._froze:
            gc.freeze()  # later collections skip what exists now, so that the processes do not copy it
        if not shared:
            return
        fork = multiprocessing.get_context("fork")
        try:
            for _ in range(self._number):
                here, there = fork.Pipe()
                self._pipes.append(here)
                arguments = (self._runtime, self._given, self.results, there, list(self._pipes))
                process = fork.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                self._processes.append(process)
                there.close()
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> int:
        """The number of processes that compute, this one where there are no others."""
        return len(self._processes) or 1

    def make_room(self, rows: int) -> None:
        """Prepare for jobs whose results take `rows` rows, from row 0.

        New memory is taken where weights of earlier jobs are still in use, as by a strategy that remembers updates.
        """
        if self._references() > self._unheld:
            gc.collect()  # Flower's records refer to themselves, so that they stay until they are collected
        if rows > self._rows or self._references() > self._unheld:
            self.close()
            self._rows = max(rows, self._rows)
            self._begin()

    def run(self, given: Mapping[str, np.ndarray], jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Run jobs on the model `given`, and yield each with its outcome as it ends, in any order.

        Raises Interrupted when asked to stop; TrainingError where a client or a worker fails; DataError where `given`
        does not fit the clients' network.
        """
        found = {name: array.shape for name, array in given.items()}
        if found != self._shapes:
            raise DataError(
                f"the strategy sent weights of another network: {found}, and the clients' has {self._shapes}"
            )
        for name, array in given.items():
            self._given[name][...] = array
        if not self._pipes:
            for job in jobs:
                if self._stop():
                    raise Interrupted("stopped")
                outcome = _attempt(self._runtime, self._given, self.results, job)
                if isinstance(outcome, FedveilError):
                    raise outcome
                yield job, outcome
            return
        yield from self._distribute(jobs)

    def _distribute(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        waiting = list(reversed(jobs))
        busy: dict[Connection, Job] = {}
        idle = list(reversed(self._pipes))
        while waiting or busy:
            while waiting and idle:
                pipe = idle.pop()
                busy[pipe] = waiting.pop()
                self._or_obituary(pipe, partial(pipe.send, busy[pipe]))
            for pipe in wait(list(busy), timeout=0.2):
                assert isinstance(pipe, Connection)
                outcome = self._or_obituary(pipe, pipe.recv)
                if isinstance(outcome, FedveilError):
                    raise outcome
                idle.append(pipe)
                yield busy.pop(pipe), outcome
            if self._stop():
                raise Interrupted("stopped")

    def _references(self) -> int:
        """Return the number of references to the memory of the results."""
        return sum(sys.getrefcount(flat) for flat in self._flat.values())

    def _or_obituary(self, pipe: Connection, do: Callable[[], Any]) -> Any:
        """Send or receive; raise TrainingError where the process at the other end has died."""
        try:
            return do()
        except (EOFError, OSError):
            process = self._processes[self._pipes.index(pipe)]
            process.join(timeout=5)
            code = process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise TrainingError(f"a worker process {how}; where memory ran out, use fewer: --workers 1") from None

    def close(self) -> None:
        """End the worker processes, even at work."""
        if self._froze:
            gc.unfreeze()
        for process in self._processes:
            process.terminate()
        for pipe in self._pipes:
            pipe.close()  # ends a worker that was not yet ready for the signal
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []


def _memory(shapes: Mapping[str, tuple[int, ...]], rows: int, shared: bool) -> Arrays:
    """Allocate float32 memory for rows of each shape; `shared`: with processes forked later, freed with the last."""
    sizes = {name: rows * math.prod(shape) for name, shape in shapes.items()}
    try:
        if not shared:
            return {name: np.empty(size, np.float32) for name, size in sizes.items()}
        return {name: np.frombuffer(mmap.mmap(-1, max(4 * size, 1)), np.float32, size) for name, size in sizes.items()}
    except (MemoryError, OSError):
        raise SettingsError(
            f"the weights of a cohort of {rows:,} take {4 * sum(sizes.values()) / 1e9:,.1f} GB, which this machine does not have; "
            "take a smaller federation.cohort or a smaller network"
        ) from None


def _serve(
    runtime: ClientRuntime, given: Arrays, results: Arrays, pipe: Connection, others: Sequence[Connection]
) -> None:
    """Do jobs until the parent ends or closes its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()  # a copy of the parent's end held here would hide that the parent is gone
    torch.set_num_threads(1)
    with threadpool_limits(1):
        while True:
            try:
                job = pipe.recv()
                pipe.send(_attempt(runtime, given, results, job))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return


def _attempt(runtime: ClientRuntime, given: Arrays, results: Arrays, job: Job) -> Outcome | FedveilError:
    """Do a job, and return its outcome, or its error for the process that runs the rounds to raise."""
    try:
        return _do(runtime, given, results, job)
    except FedveilError as error:
        return error
    except Exception as error:
        # in a simulation a client's exception is a mistake in the experiment, not a fault of a machine
        clients = job.contributions.clients
        who = f"client {clients[0]}" if len(clients) == 1 else f"one of clients {_names(clients)}"
        return TrainingError(f"{who} failed: {type(error).__name__}: {error}{where(error)}")


def _do(runtime: ClientRuntime, given: Arrays, results: Arrays, job: Job) -> Outcome:
    started = time.perf_counter()
    contributions = job.contributions
    if job.steps is None:
        scores = [score(runtime, client, given, held_out=True) for client in contributions.clients]
        return Outcome(time.perf_counter() - started, scores=scores)
    rows = slice(job.first, job.first + len(contributions.clients))
    whole = replace(contributions, given=given, weights={name: array[rows] for name, array in results.items()})
    compute(runtime, steps_of(runtime)[slice(*job.steps)], whole)
    return Outcome(time.perf_counter() - started, replace(whole, given={}, weights={}))


def _names(clients: Sequence[int]) -> str:
    return ", ".join(str(client) for client in clients[:5]) + (", ..." if len(clients) > 5 else "")
