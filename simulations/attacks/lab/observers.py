"""The observers, and what each one sees of a run's captures, which hold only what really travelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedveil.client.learning.homomorphic import HomomorphicClient
from fedveil.core.errors import SettingsError, nearest
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Training
from fedveil.core.wire.messages import SEALED, WEIGHT
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout, dequantize, flatten, quantize, unflatten
from fedveil.privacy.homomorphic.keys import find_client_key
from fedveil.privacy.homomorphic.wire import round_of
from fedveil.privacy.plan import plan_for
from fedveil.server.checkpoint import load_state
from fedveil.server.federation import prepare
from fedveil.server.rounds.captures import Captured, Update, read_captures
from fedveil.simulations.attacks.lab.observation import Observation, Parameters
from fedveil.simulations.attacks.lab.pairs import Sum
from fedveil.simulations.run import quiet_flower

# returns the weights of a model; None where it is a ciphertext to this observer
Open = Callable[[Parameters], Parameters | None]
# with the clients whose examples are in each observation: for scoring, not for attacks
Seen = list[tuple[Observation, tuple[int, ...]]]


@dataclass(frozen=True)
class Observer:
    """An observer of a run.

    knows: who it is and what it sees, for people; alone: it sees each client's update, where that is not protected
    opens: it holds the clients' key; crafts: it makes up the model that is sent; wire: it sees what passes between machines
    pairs: it compares two runs; deployed: in the second, clients draw what their training draws anew
    """

    knows: str
    alone: bool = False
    opens: bool = False
    crafts: bool = False
    wire: bool = False
    pairs: bool = False
    deployed: bool = False


OBSERVERS: dict[str, Observer] = {
    "server": Observer(
        "the server: follows the protocol, and looks at all that it gets; it knows the settings", alone=True
    ),
    "malicious-server": Observer(
        "a server that makes up the model which it sends, and looks at what comes back", alone=True, crafts=True
    ),
    "aggregate": Observer(
        "whoever sees the models before and after a round and no single update: a server under secure aggregation"
    ),
    "malicious-aggregate": Observer(
        "a server under secure aggregation that makes up one model for all, and reads the sum of what comes back",
        crafts=True,
    ),
    "client": Observer(
        "another client: is sent the model before and after a round, and takes its own update out of the mean where that "
        "travelled in the clear",
        opens=True,
    ),
    "key-holder": Observer(
        "whoever holds the key that all clients share, and reads the aggregates with it", opens=True
    ),
    "two-runs": Observer(
        "whoever reads the sums of two runs, the second without one of the first's clients: a server under secure "
        "aggregation, or who holds the key; training repeats from the seed",
        opens=True,
        pairs=True,
    ),
    "two-deployed-runs": Observer(
        "the same where clients draw orders, dropout and noise anew in each run, as on machines of their own",
        opens=True,
        pairs=True,
        deployed=True,
    ),
    "wire": Observer(
        "whoever listens between the machines: sees TLS, which is bytes and their number", alone=True, wire=True
    ),
}


def find_observer(name: str) -> Observer:
    """Return the observer called `name`; raise SettingsError with the nearest name where there is none."""
    if name not in OBSERVERS:
        raise SettingsError(
            f"--observer: no observer is called '{name}'{nearest(name, OBSERVERS)}\n  known: {', '.join(OBSERVERS)}"
        )
    return OBSERVERS[name]


def observe(folder: Path, experiment: Experiment, name: str) -> Seen:
    """Return what an observer saw of a run's captured rounds; raise SettingsError where there are none."""
    observer = find_observer(name)
    if observer.pairs:
        raise SettingsError(f"--observer {name}: compares two runs; name both, --against RUN --against RUN")
    opened = opener(folder, experiment) if observer.opens else _in_the_clear
    found: Seen = []
    for captured in read_captures(folder):
        training = experiment.training.model_copy(update={"learning_rate": captured.learning_rate})
        if observer.wire:
            found += [
                (Observation(name, captured.round, "ciphertext", before=None, update=None), (client,))
                for client in captured.trained
            ]
        elif observer.alone:
            found += [
                (_single(name, captured, update, experiment, training), (client,))
                for client, update in captured.trained.items()
            ]
        else:
            clients = tuple(captured.trained)
            own = clients[0] if name == "client" and len(clients) > 1 else None
            found.append(_mean(name, captured, opened, experiment, training, own))
    if observer.crafts:
        found = [(replace(observation, crafted=True), clients) for observation, clients in found]
    return found


def sums(folder: Path, experiment: Experiment, name: str, rounds: Sequence[Captured]) -> list[Sum]:
    """Return the sums of captured rounds that an observer reads, each with its clients."""
    opened = (
        opener(folder, experiment)
        if any(SEALED in each.before or SEALED in each.after for each in rounds)
        else _in_the_clear
    )
    found = []
    for captured in rounds:
        training = experiment.training.model_copy(update={"learning_rate": captured.learning_rate})
        observation, _ = _mean(name, captured, opened, experiment, training, None)
        clients = {client: _examples(update) or 0 for client, update in captured.trained.items()}
        step = plan_for(experiment).grid.step if experiment.privacy.protected else 0.0
        found.append(Sum(observation, clients, len(clients) / 2 * step * sum(clients.values())))
    return found


def _in_the_clear(parameters: Parameters) -> Parameters | None:
    return None if SEALED in parameters else parameters


def _single(name: str, captured: Captured, update: Update, experiment: Experiment, training: Training) -> Observation:
    before = _in_the_clear(captured.before)
    clear = update.weights is not None and before is not None
    sealed = "masked" if experiment.privacy.shows == "mean" else "ciphertext"
    return Observation(
        observer=name,
        round=captured.round,
        kind="delta" if clear else sealed,  # type: ignore[arg-type]
        before=before,
        update=_difference(update.weights, before) if clear else None,  # type: ignore[arg-type]
        sent=update.sealed,
        examples=_examples(update),
        metrics=update.metrics,
        training=training,
    )


def _mean(
    name: str, captured: Captured, opened: Open, experiment: Experiment, training: Training, own: int | None
) -> tuple[Observation, tuple[int, ...]]:
    before, after = opened(captured.before), opened(captured.after)
    clients = tuple(captured.trained)
    examples = {client: _examples(update) or 0 for client, update in captured.trained.items()}
    still = None if before is None else _unmoved(before, examples, experiment)
    update = None if still is None or after is None else _difference(after, still)
    mine = captured.trained[own].weights if own is not None else None
    if own is not None and update is not None and mine is not None and before is not None:
        total, weight = sum(examples.values()), examples[own]
        moved = _difference(mine, before)
        update = {key: (total * value - weight * moved[key]) / (total - weight) for key, value in update.items()}
        clients = tuple(client for client in clients if client != own)
    return Observation(
        observer=name,
        round=captured.round,
        kind="ciphertext" if update is None else "aggregate",
        before=before,
        update=update,
        clients=len(clients),
        examples=sum(examples[client] for client in clients) or None,
        training=training,
    ), clients


def _unmoved(before: Parameters, examples: Mapping[int, int], experiment: Experiment) -> Parameters:
    """Return the mean of untrained clients as the protection's grid rounds it; the rounding is public."""
    if not experiment.privacy.protected:
        return before
    plan, layout = plan_for(experiment), Layout.of(before)
    vector, held = flatten(before), sum(examples.values())
    reference = plan.reference(held)
    total = sum(quantize(vector, n, reference, plan.grid, layout)[0] for n in examples.values())
    return unflatten(dequantize(np.asarray(total), held, reference, plan.grid), layout)


def _examples(update: Update) -> int | None:
    value = update.metrics.get(WEIGHT)
    return None if value is None else int(value)


def _difference(after: Parameters, before: Parameters) -> Mapping[str, np.ndarray]:
    """Return the difference in float64, where that of two float32 numbers is exact."""
    return {name: np.asarray(after[name], np.float64) - np.asarray(value, np.float64) for name, value in before.items()}


def opener(folder: Path, experiment: Experiment) -> Open:
    """Return a function that reads a run's models, with the clients' key in its record where they are ciphertexts."""
    if experiment.privacy.shows != "sum":
        return _in_the_clear
    record = Record(folder)
    state, _ = load_state(record)
    with quiet_flower():
        network = prepare(experiment, record).network
        side = HomomorphicClient(
            plan_for(experiment),
            experiment.data.clients,
            Layout.of(to_numpy(get(network))),
            find_client_key(record.path("keys"), 0),
        )

    def opened(parameters: Parameters) -> Parameters | None:
        if SEALED not in parameters:
            return parameters
        blob = parameters[SEALED].tobytes()
        return side.open(blob, bytes.fromhex(state.run), round_of(blob))

    return opened
