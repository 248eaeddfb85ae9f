"""The server's process of a run with clients on other machines: its federation, its record, and its result.

The server may lack the data, and then cannot evaluate; under CKKS and BFV it cannot read the model either. The task of
the network then follows from the schemas of the clients' data, on which all must agree.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedveil.core.errors import DataError, FedveilError, Interrupted
from fedveil.core.examples import Examples, Task
from fedveil.core.record.record import Record, alone
from fedveil.core.record.resumes import note_resume
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import Alone, Federated, load
from fedveil.datasets.own.local import TASKS, differences, schema
from fedveil.models.parameters import get
from fedveil.privacy.homomorphic.keys import fingerprint
from fedveil.privacy.trust.key_folders import load_registry
from fedveil.privacy.trust.manifest import UNSIGNED, Manifest, now
from fedveil.server.checkpoint import State, begun, put_back
from fedveil.server.exchange import Row
from fedveil.server.federation import Federation, federate, prepare, resolve
from fedveil.server.rounds.context import Hooks
from fedveil.server.serving.agreement import Agreement
from fedveil.server.serving.checks import check_size, scoreless
from fedveil.server.serving.client_roster import ClientRoster
from fedveil.server.serving.control_client import ControlClient
from fedveil.server.serving.tokens import RUN_TOKEN
from fedveil.server.summary import describe_protection, scores_line, summary

Say = Callable[[str], None]


def run_deployed(grid: Grid, config: Mapping[str, Any], say: Say) -> None:
    """Run or resume the experiment of a run configuration, and report its result to the control server.

    say: receives messages for people
    """
    line = ControlClient(str(config["control"]), os.environ.pop(RUN_TOKEN, ""))  # taken away from workers
    folder = Path(str(config["record"]))
    try:
        summary = _run(grid, config, line, folder, say)
    except Interrupted as error:
        say(f"stopped: {error}")
        line.result("stopped", {"error": str(error)})
    except FedveilError as error:
        say(f"failed: {error}")
        line.result("failed", {"error": str(error)})
    except Exception as error:
        logging.getLogger("flwr").exception("the run's process failed")
        line.result("failed", {"error": f"{type(error).__name__}: {error}; the server's log says where"})
        raise
    else:
        line.result("done", summary)


def _federation(
    experiment: Experiment, roster: ClientRoster, earlier: Record | None, words: list[str] | None, say: Say
) -> Federation:
    """Prepare the experiment for data on other machines."""
    dataset, expected = _dataset(experiment, roster, words, say)
    roster.expect(expected)
    nothing = dataset.test.take(np.arange(0))
    elsewhere = Federated(replace(dataset, train=nothing, groups=None), Alone(nothing, 0), experiment.seed, 0.0)
    return prepare(experiment, earlier, elsewhere)


def _dataset(
    experiment: Experiment, roster: ClientRoster, words: list[str] | None, say: Say
) -> tuple[DataSet, dict[str, str]]:
    """Return the data set as far as the server knows it, and the schema that every client's data must fit.

    It has at least the task, and at most a test part too.
    """
    data = experiment.data
    known = data.dataset.name in TASKS or data.dataset.is_own or data.path is not None
    if known and experiment.privacy.shows != "sum":
        try:
            dataset = load(data, experiment.seed).dataset
            return dataset, schema(dataset.task, dataset.words, dataset.columns)
        except DataError as error:
            say(f"no test data on this machine, so test_accuracy is null: {error}")
    vocabulary = tuple(words) if words else None
    expected = None
    if data.dataset.name in TASKS:
        task = TASKS[data.dataset.name]
    else:
        roster.get_node_ids()
        task, expected = _agreed_task(roster, experiment)
    if task.kind == "text":
        size = len(vocabulary) if vocabulary else data.vocabulary_size
        task = Task("text", (data.max_tokens,), task.classes, size)
    kind = np.int32 if task.kind == "text" else np.float32
    nothing = Examples(np.zeros((0, *task.shape), kind), np.zeros(0, np.int64))
    dataset = DataSet(data.dataset.name, task, nothing, nothing, words=vocabulary)
    return dataset, expected or schema(task, vocabulary)


def _agreed_task(roster: ClientRoster, experiment: Experiment) -> tuple[Task, dict[str, str]]:
    """Return the task and the schema of the clients' own data.

    Raise DataError, naming who differs, where they do not agree.
    """
    members = sorted(roster.members.items())
    first, told = members[0][0], members[0][1].schema
    for client, member in members[1:]:
        if found := differences(told, member.schema):
            raise DataError(
                f"the clients' data is of different kinds: {roster.called(first)} (here) and {roster.called(client)} (there) differ: "
                + "; ".join(found)
            )
    if "predicts" in told:
        raise DataError(
            f"data.dataset = '{experiment.data.dataset}': the clients' task is {told['predicts']}, whose data set the server "
            "must be able to load too, with a protection under which it evaluates (none, secagg)"
        )
    if experiment.data.labels is None:
        raise DataError("data.labels: must name the classes where every client has data of its own")
    shape = told.get("shape", "")
    if told["kind"] == "text":
        return Task("text", (), experiment.data.labels), told
    sides = tuple(int(side) for side in shape.split(" x "))
    return Task(told["kind"], sides, experiment.data.labels), told  # type: ignore[arg-type]


def _agreement(config: Mapping[str, Any], folder: Path) -> Agreement | None:
    """Return the manifest of a run and its signatures, begun or resumed; None where clients have no keys."""
    registry = load_registry(Path(str(config["keys"]))) if config["keys"] else None
    if registry is None:
        return None
    manifest = Manifest.of(
        os.urandom(16).hex(),
        str(config["experiment"]),
        str(config["words"]),
        registry,
        reproducible=bool(config.get("reproducible")),
        created=now(),
    )
    return Agreement.resume(folder, manifest, registry) or Agreement(manifest, registry)


def _run(grid: Grid, config: Mapping[str, Any], line: ControlClient, folder: Path, say: Say) -> dict[str, Any]:
    experiment = resolve(Experiment.parse(str(config["experiment"])))
    experiment = experiment.override({"engine": "sequential", "workers": None})  # one message at a time
    words = str(config["words"]).split("\n") if config["words"] else None
    agreement = _agreement(config, folder)
    roster = ClientRoster(grid, experiment, line, say, agreement)
    earlier = Record(folder) if config["resume"] else None
    goes_on = earlier is not None and begun(earlier)  # a run killed before its first checkpoint begins anew
    if earlier is not None and goes_on:
        kept = Experiment.load(earlier.folder / "experiment.toml").privacy.calibrated
        if kept is not None:
            experiment = experiment.override({"privacy.calibrated": kept})
    federation = _federation(experiment, roster, earlier if goes_on else None, words, say)
    experiment = federation.experiment  # with calibrated noise
    manifest = UNSIGNED
    if agreement is not None:
        manifest = agreement.manifest.digest
        federation.state.run = agreement.manifest.run if experiment.privacy.protected else ""
    weights = sum(weight.numel() for weight in get(federation.network).values())
    check_size(experiment, weights, int(config["limit"]))
    federation.protect(Path(str(config["keys"])) if config["keys"] else None, roster.sizes, manifest)
    if federation.protection is not None:
        say(f"privacy {experiment.privacy.protection} {federation.protection.words}")
    record = earlier or Record.create(experiment, folder)
    with alone(folder):
        if agreement is not None:
            agreement.keep(folder)
        if goes_on:
            put_back(record, federation.state)
            note_resume(record, experiment, federation.state.round)
            say(f"going on after round {federation.state.round}")
        if federation.protection is not None:
            reader = "who holds client.key" if experiment.privacy.shows == "sum" else "the server"
            context = federation.protection.context
            key = None if context is None else fingerprint(context.key_id)
            describe_protection(experiment, record, f"{reader} can evaluate the model", key)

        def watch(row: Row, state: State) -> None:
            if row["round"] or row.get("test_accuracy") is not None:  # else nothing is known before the first round
                say(f"round {row['round']}/{experiment.federation.rounds}  {scores_line(row, state)}")

        lattices = experiment.privacy.shows == "sum"
        evaluate = None if lattices or not len(federation.federated.dataset.test) else federation.evaluate
        if why := scoreless(experiment, evaluate is not None):
            say(f"warning: {why}")
        hooks = Hooks(watch, evaluate, lambda text: say(f"warning: {text}"), lenient=True, secret=True)
        federate(federation, roster, record, hooks)
    return summary(federation, record, secret=True)
