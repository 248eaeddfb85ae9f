"""Two runs whose cohorts differ by few clients: the difference of their sums is what those clients sent.

A tracker, in the words of Denning, Denning and Schwartz 1979 ("The Tracker: A Threat to Statistical Database Security"):
two sums that may both be told, and give one row away. The clients of both sums cancel as far as their training repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file
from torch import nn

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import reading
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import SEALED, WEIGHT
from fedveil.datasets.federated import Federated
from fedveil.models.computing import one_thread
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.models.parameters import from_numpy, get, to_numpy
from fedveil.privacy.defences import defend, share
from fedveil.privacy.fixed_point import Layout, dequantize, flatten, quantize, unflatten
from fedveil.privacy.plan import make_plan
from fedveil.server.checkpoint import MODEL
from fedveil.server.protection.masked import on_grid
from fedveil.server.protection.noise import noisy_sum, server_draw
from fedveil.server.rounds.captures import FOLDER, Captured, Update, read_captures
from fedveil.simulations.attacks.lab.observation import Observation, Parameters

FEW = 3  # clients by which two cohorts may differ: the sum of more is an aggregate like any other
MEANS = ("fedavg", "fedprox")  # strategies whose next model is the mean, so that a model tells it
FREE = {  # settings that change neither what a client trains nor what is added up
    "name", "engine", "workers", "device", "evaluation", "federation.rounds", "federation.cohort", "federation.capture",
    "federation.deadline", "federation.quorum", "federation.target_accuracy", "federation.patience",
    "privacy.protection.min_clients", "privacy.protection.drop_outs", "privacy.protection.colluders",
}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """What an observer saw of one round of one run: its aggregate, and which clients are in it.

    clients: with the examples of each; 1 where clients weigh alike
    rounding: how far rounding to a protection's grid puts the sum of all their examples' weights off, at most
    """

    observation: Observation
    clients: Mapping[int, int]
    rounding: float


def check_alike(first: Experiment, second: Experiment, names: tuple[str, str]) -> None:
    """Raise SettingsError, naming the settings, where two runs trained or added up in different ways."""
    one, two = (dict(_plain(each.model_dump(exclude_none=True))) for each in (first, second))
    differ = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key) and not _free(key)]
    if differ:
        each = "; ".join(f"{key} is {one.get(key, 'not set')!r} and {two.get(key, 'not set')!r}" for key in differ)
        raise SettingsError(
            f"--against {names[0]} --against {names[1]}: their clients trained in different ways ({each}), so nothing cancels; "
            "compare two runs of the same settings and seed, whose cohorts differ"
        )


def _plain(found: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    plain: list[tuple[str, Any]] = []
    for key, value in found.items():
        plain += _plain(value, f"{before}{key}.") if isinstance(value, Mapping) else [(before + key, value)]
    return plain


def _free(key: str) -> bool:
    return any(key == each or key.startswith(each + ".") for each in FREE)


def difference(name: str, one: Sum, two: Sum, noisy: bool = False) -> tuple[Observation, tuple[int, ...]]:
    """Return what the sums of one round of two runs tell of the clients that are in one of them alone, and which these are.

    (N_A mean_A - N_B mean_B) / (N_A - N_B), as changes of the same model; 0 where that is within what rounding explains
    Raise SettingsError where the cohorts do not differ so, or the runs started from different models.
    """
    more, fewer = (one, two) if len(one.clients) >= len(two.clients) else (two, one)
    gone = tuple(sorted(set(more.clients) - set(fewer.clients)))
    extra = set(fewer.clients) - set(more.clients)
    number = one.observation.round
    if extra or not 1 <= len(gone) <= FEW:
        raise SettingsError(
            f"round {number}: the cohorts differ by {len(gone)} client(s) that only the larger has, and {len(extra)} that only the "
            f"smaller has; differencing needs a cohort that is the other one and 1 to {FEW} clients more"
        )
    a, b = more.observation, fewer.observation
    if a.before is not None and b.before is not None:
        moved = [key for key, value in a.before.items() if not np.array_equal(value, b.before[key])]
        if moved:
            raise SettingsError(
                f"round {number}: the two runs trained different models ({moved[0]} differs), so that clients of both do not cancel; "
                "compare runs at a round that both began with the same model, the first say"
            )
    n_a, n_b = sum(more.clients.values()), sum(fewer.clients.values())
    update = None
    if a.update is not None and b.update is not None:
        update = {key: (n_a * value - n_b * b.update[key]) / (n_a - n_b) for key, value in a.update.items()}
        for key, value in update.items():
            assert a.before is not None  # as there is an update of it
            reach = np.abs(a.before[key]) + np.abs(a.update[key]) + np.abs(b.update[key])
            # a mean, and the mean of unmoved clients that is taken off it, are float32 each
            off = one.rounding + two.rounding + (n_a + n_b) * np.spacing(reach.astype(np.float32))
            value[np.abs(value) <= off / (n_a - n_b)] = 0.0
    found = replace(
        a,
        observer=name,
        kind="ciphertext" if update is None else "delta" if len(gone) == 1 else "aggregate",
        update=update,
        clients=len(gone),
        examples=None if noisy else n_a - n_b,
        together=a.update,
    )
    return found, gone


def captured_of(folder: Path, experiment: Experiment, network: nn.Module) -> list[Captured]:
    """Return the rounds of a run that its record tells: those captured, or the one round of a run that has one.

    network: of the experiment, with the weights that its seed gives
    Raise SettingsError where there is neither.
    """
    if (folder / FOLDER).is_dir():
        return read_captures(folder)
    strategy, record = str(experiment.federation.strategy), Record(folder)
    model = record.path(MODEL)
    if experiment.federation.rounds != 1 or strategy not in MEANS or not model.exists():
        raise SettingsError(
            f"{folder}: the run has no captures, and its models tell no round's mean, as those of one round of "
            f"{' or '.join(MEANS)} do; run it with --set federation.capture=true"
        )
    with reading(lambda why: SettingsError(f"{folder}: its record cannot be read ({why}); run it again")):
        rows = pd.read_csv(record.path("clients.csv"))
        after = load_file(model)
    weigh = dict(zip(rows["client"].tolist(), rows["examples"].fillna(1).astype(int).tolist(), strict=True))
    updates = {client: Update(None, b"", {WEIGHT: examples}) for client, examples in weigh.items()}
    before = to_numpy(get(network))
    return [Captured(1, before, {key: after[key] for key in before}, updates, experiment.training.learning_rate)]


def anew(
    experiment: Experiment,
    federated: Federated,
    network: nn.Module,
    captured: Captured,
    clients: Sequence[int],
    seed: int,
) -> Captured:
    """Return a round of these clients from the same model, with all that they draw drawn anew, as between machines.

    Computed by the functions of a client and a protection, without their messages; `seed`: of what is drawn, which is
    nobody's to know between machines. The weights are those of `captured`, from which `clients` are taken.
    """
    before, privacy = captured.before, experiment.privacy
    if captured.clip is not None:
        privacy = privacy.model_copy(update={"clip": captured.clip})
    streams = {client: Stream(seed, captured.round, client) for client in clients}
    with one_thread():
        trained = train_clients(
            network, from_numpy(before), [federated.client(client)[0] for client in clients], experiment.training,
            captured.learning_rate, list(streams.values()), classes=federated.dataset.task.labels,
        )  # fmt: skip
    made = to_numpy(trained.parameters)
    layout, weigh = Layout.of(before), {client: int(captured.trained[client].metrics[WEIGHT]) for client in clients}
    total, reference = np.zeros(layout.size), sum(weigh.values())
    plan = make_plan(privacy, len(clients)) if privacy.protected else None
    for k, client in enumerate(clients):
        own = {key: value[k] for key, value in made.items()}
        sent = defend(privacy, dict(before), own, streams[client], secret=False)
        if plan is None:
            total += flatten(sent, np.float64) * weigh[client]
            continue
        weights, noise = share(privacy, plan, dict(before), sent, streams[client], secret=False)
        added = None if noise is None else flatten(noise, np.float64)
        total += quantize(flatten(weights, np.float64), weigh[client], reference, plan.grid, layout, added)[0]
    mean = (
        (total / reference).astype(np.float32) if plan is None else dequantize(total, reference, reference, plan.grid)
    )
    after: Parameters = unflatten(mean, layout)
    again = experiment.override({"seed": seed})
    draw = server_draw(again, None, secret=False)
    changed = noisy_sum(
        again,
        captured.round,
        before,
        len(clients),
        captured.clip,
        draw,
        secret=False,
        learning_rate=captured.learning_rate,
    )
    if changed is not None:
        given = flatten(before)
        still = given.astype(np.float64) if plan is None else on_grid(given, plan, reference)
        after = changed.of_mean(after, len(clients), still)
    updates = {client: Update(None, b"", {WEIGHT: weigh[client]}) for client in clients}
    return replace(captured, after=after, updates=updates)


def update_of(
    experiment: Experiment, federated: Federated, network: nn.Module, observation: Observation, clients: Sequence[int]
) -> Parameters:
    """Return the mean update that these clients make of the observed model, before any protection, for scoring.

    Training repeats from the experiment's seed; where it was secret, this is what the clients might have sent as well.
    """
    if observation.before is None or SEALED in observation.before or observation.training is None:
        return {}
    held = [federated.client(client)[0] for client in clients]
    with one_thread():
        trained = train_clients(
            network, from_numpy(observation.before), held, observation.training, observation.training.learning_rate,
            [Stream(experiment.seed, observation.round, client) for client in clients],
            classes=federated.dataset.task.labels,
        )  # fmt: skip
    weigh = np.ones(len(held)) if experiment.privacy.noisy else np.array([len(each) for each in held])
    before = observation.before
    return {
        key: np.tensordot(weigh / weigh.sum(), np.float64(value), axes=1) - np.float64(before[key])
        for key, value in to_numpy(trained.parameters).items()
    }


def first_network(experiment: Experiment, federated: Federated) -> nn.Module:
    """Return the network with the weights that the experiment's seed gives."""
    return build(federated.dataset.task, experiment.model, Stream(experiment.seed))
