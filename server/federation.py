"""The server of a federation: all that a run needs, made and checked before anything is written, and the run itself.

`simulations/run.py` calls this with an in-process grid, `server/app.py` with Flower's.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp import Grid
from threadpoolctl import threadpool_limits
from torch import nn

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.examples import Examples
from fedveil.core.metrics import MetricSet, Scores
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.federated import Federated, load
from fedveil.datasets.hold_out import fewest_left
from fedveil.models.computing import find_device, put, repeatable
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.training import check_training
from fedveil.models.networks.build import build
from fedveil.models.parameters import constants, from_numpy, get, to_numpy
from fedveil.privacy.defences import find_defence
from fedveil.privacy.dp.accounting.guarantee import calibrated, describe, name_of
from fedveil.privacy.dp.accounting.refusals import refuse_own_words
from fedveil.privacy.dp.adaptive import START
from fedveil.privacy.dp.examples import check_sizes, most_used
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.trust.manifest import UNSIGNED
from fedveil.server.checkpoint import Parameters, State, load_state, save_state, write_layout
from fedveil.server.protection.noise import noise_key, server_draw
from fedveil.server.protection.server_protection import ServerProtection, check_protection, protect_server
from fedveil.server.rounds.accounting import Accounting
from fedveil.server.rounds.captures import Capture
from fedveil.server.rounds.context import Context, Hooks
from fedveil.server.rounds.loop import run_rounds
from fedveil.server.rounds.observers import BestModel, Checkpoint, Observer, Stopping, Tables, Watch
from fedveil.server.rounds.strategy import Strategy
from fedveil.server.strategies import make

NOISE = "noise.json"  # file in the record of a run with noise


@dataclass
class Federation:
    """An experiment ready to run: its data, network and strategy, and the state to start from."""

    experiment: Experiment
    federated: Federated
    network: nn.Module
    strategy: Strategy
    state: State
    device: torch.device
    protection: ServerProtection | None = None

    @cached_property
    def metrics(self) -> MetricSet:
        """The metrics of each evaluation."""
        return _metrics(self.experiment, self.federated)

    def evaluate(self, parameters: Parameters) -> Scores:
        """Evaluate a model on the test part of the data set."""
        test, kind = self.federated.dataset.test, self.experiment.training.loss
        weights = from_numpy(parameters, self.device)
        return evaluate(self.network, weights, test, kind, statistics=self.metrics.statistics)

    def protect(
        self,
        keys: Path | None,
        announced: Callable[[Sequence[int]], Sequence[int]] | None = None,
        manifest: bytes = UNSIGNED,
    ) -> None:
        """Set up the server's part of the experiment's protection.

        keys: the folder that holds server.ctx, where the protection needs it
        announced: returns the examples of each of some clients, where they are not known from the data
        manifest: SHA-256 of the run's signed manifest; zeros where it has none
        Raise SettingsError or ProtectionError where it cannot work.
        """
        experiment, federated = self.experiment, self.federated

        def sizes(clients: Sequence[int]) -> Sequence[int]:
            return [int(n) for n in federated.sizes(np.asarray(clients))]

        layout = Layout.of(to_numpy(get(self.network)))
        run = bytes.fromhex(self.state.run)
        self.protection = protect_server(experiment, layout, run, announced or sizes, keys, manifest)


def resolve(experiment: Experiment) -> Experiment:
    """Replace the device `auto` by the device that it means here, so that a resumed run computes as before."""
    return experiment.override({"device": find_device(experiment.device).type})


def prepare(experiment: Experiment, resume: Record | None = None, elsewhere: Federated | None = None) -> Federation:
    """Load, build and check all that a run needs; write nothing.

    experiment: resolved; resume: the record of the run to resume
    elsewhere: stands for data on other machines, which is not loaded and checked here
    Raise SettingsError or DataError where the run cannot start or resume.
    """
    device = find_device(experiment.device)
    protected = experiment.privacy.protected
    check_protection(experiment)
    federated = elsewhere or load(experiment.data, experiment.seed)
    if elsewhere is None:
        _check_evaluators(experiment, federated)
        find_defence(experiment.privacy)  # refuse a defence that cannot be loaded here, not in every client
    task = federated.dataset.task
    if elsewhere is None and task.kind == "text":
        refuse_own_words(experiment)
    strategy = make(experiment, _metrics(experiment, federated))
    check_training(task, experiment.training)
    network = put(build(task, experiment.model, Stream(experiment.seed)), device)
    named = experiment.data.path or experiment.data.dataset.is_own
    digest = _digest(federated) if named and elsewhere is None else ""
    if resume is None:
        state = State(to_numpy(get(network)), data=digest, run=os.urandom(16).hex() if protected else "")
    else:
        state, kept = load_state(resume)
        _check_mechanism(experiment, state, resume)
        if state.data != digest:
            raise DataError(
                f"fedveil resume {resume.folder}: the data is not what it was when the run began; start a new run"
            )
        strategy.restore(kept)
    state.constants = to_numpy(constants(network))
    state.mechanism = name_of(experiment)
    if experiment.privacy.clip == "adaptive" and not state.clip:
        state.clip = START
    if experiment.privacy.per_example:
        sizes = None if elsewhere else _sizes(experiment, federated)
        smallest = fewest_left(experiment.data) if sizes is None else int(sizes.min())
        check_sizes(experiment, smallest)
        state.smallest = most_used(experiment, smallest, sizes)
    state.numbers = sum(parameter.numel() for parameter in network.parameters())
    experiment = calibrated(experiment, state.numbers, state.smallest)
    check_protection(experiment)  # again, with the noise that its grid must not swallow
    return Federation(experiment, federated, network, strategy, state, device)


def _check_mechanism(experiment: Experiment, state: State, record: Record) -> None:
    """Raise SettingsError where a run was begun with another mechanism of noise than it would go on with."""
    if state.mechanism != name_of(experiment):
        raise SettingsError(
            f"fedveil resume {record.folder}: the run's noise is of the mechanism '{state.mechanism or 'none'}', and its settings "
            f"now ask for '{name_of(experiment) or 'none'}'; what both release together has no guarantee, so start a new run"
        )


def _sizes(experiment: Experiment, federated: Federated) -> np.ndarray:
    """Return the examples of each client, int64 [clients]; raise SettingsError where delta is too large for them all."""
    sizes = federated.sizes(np.arange(experiment.data.clients))
    if experiment.privacy.delta * int(sizes.sum()) >= 1:
        raise SettingsError(
            f"privacy.delta = {experiment.privacy.delta:g}: must be smaller than 1 / {int(sizes.sum()):,}, the examples of all "
            "clients; a larger one would allow showing one of them"
        )
    return sizes


def _metrics(experiment: Experiment, federated: Federated) -> MetricSet:
    own = experiment.evaluation.metrics or ()
    return MetricSet.of(federated.dataset.task, own, f"data.dataset = '{experiment.data.dataset}'")


def _check_evaluators(experiment: Experiment, federated: Federated) -> None:
    """Raise SettingsError where federated evaluation has a client with nothing to hold out."""
    short = federated.fewer_than(2) if experiment.evaluation.federated else 0
    if short:
        raise SettingsError(
            f"evaluation.federated = true: {short:,} of {experiment.data.clients:,} clients hold one example, which they "
            "train on, and none to evaluate on; set data.min_examples = 2, or fewer data.clients"
        )


def _digest(federated: Federated) -> str:
    """Return the SHA-256 of all stored examples."""
    found = sha256()
    for part in (federated.dataset.train, federated.dataset.test):
        if isinstance(part, Examples):
            found.update(np.ascontiguousarray(part.features).data)
            found.update(np.ascontiguousarray(part.labels).data)
            if part.mask is not None:
                found.update(np.ascontiguousarray(part.mask).data)
    return found.hexdigest()


def federate(federation: Federation, grid: Grid, record: Record, hooks: Hooks) -> None:
    """Run the remaining rounds, so that they repeat, and save each complete round in the record.

    Raise what `run_rounds` raises.
    """
    experiment, strategy, state = federation.experiment, federation.strategy, federation.state
    observers = _observers(federation, record, hooks)
    draw = server_draw(experiment, _noise_key(federation, record, hooks), secret=hooks.secret)
    context = Context(
        grid, experiment, strategy, federation.protection, hooks, observers, federation.metrics, record.folder, draw
    )
    if hooks.secret and experiment.privacy.noisy and not state.turns:
        state.turns = secrets.randbits(63)
    # the second is for NumPy, which strategies compute with
    with repeatable(federation.device), threadpool_limits(1, user_api="blas"):
        if described := describe(experiment, secret=hooks.secret):
            record.write(NOISE, json.dumps(described, indent=2).encode() + b"\n")
        if federation.protection is not None and federation.protection.context is not None:
            write_layout(record, federation.protection.layout, state.constants)
        if state.round == 0 and not state.pending:
            save_state(record, experiment, state, strategy)
        run_rounds(context, state)
    noise_file(record).unlink(missing_ok=True)  # who has it can take the noise away again


def noise_file(record: Record) -> Path:
    """Return the path of the key of a run's banded noise: beside its record, which may be shown to others."""
    return record.folder.with_name(f"{record.folder.name}.noise-key")


def _noise_key(federation: Federation, record: Record, hooks: Hooks) -> bytes | None:
    """Return the key of a run's banded noise where noise is secret, made by a run that begins; None elsewhere.

    Raise SettingsError where a run that goes on has lost it.
    """
    experiment, state = federation.experiment, federation.state
    done = state.stopped or state.round >= experiment.federation.rounds
    if not hooks.secret or experiment.privacy.noise != "banded" or done:
        return None
    return noise_key(noise_file(record), begins=not state.cohorts)


def _observers(federation: Federation, record: Record, hooks: Hooks) -> list[Observer]:
    """Return the observers of the rounds, in the order of their effects: a checkpoint holds the tables' newest rows."""
    experiment, protected = federation.experiment, federation.protection is not None
    return [
        *([Capture(experiment, record)] if experiment.federation.capture else []),
        Accounting(experiment, protected=protected, inspect=hooks.inspect),
        BestModel(experiment),
        Stopping(experiment),
        Tables(record),
        Checkpoint(record, experiment, federation.strategy, secret=hooks.secret, protected=protected),
        Watch(hooks.watch),
        *hooks.observers,
    ]
