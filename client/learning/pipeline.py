"""The list of steps of a client's work, and their execution for the K clients of one process.

A step changes `Contributions` in place. It says where it may run, for engines of many processes:
`anywhere`: for any chunk of clients, in any process; `home`: for any chunk, in the process that runs the rounds;
`together`: for the whole cohort at once, in that process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedveil.client.learning import local, protection, transforms
from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.client.learning.secagg import SESSION
from fedveil.client.learning.states import ClientStates, StateKey

Where = Literal["anywhere", "home", "together"]


def _always(_runtime: ClientRuntime) -> bool:
    return True


@dataclass(frozen=True)
class Step:
    """One step of a client's work.

    run: executes the step for the contributions of some clients. It raises what ends the run, and puts a refusal of one
    client into `Contributions.refusals`
    keeps: the state that the step reads and changes, as `Contributions.states[keeps.name]`
    active: whether the experiment has this step
    """

    name: str
    run: Callable[[ClientRuntime, Contributions], None]
    where: Where = "anywhere"
    keeps: StateKey | None = None
    active: Callable[[ClientRuntime], bool] = _always


STEPS: list[Step] = [
    Step("measure", local.measure),
    Step("train", local.train),
    Step("adversary", transforms.corrupt, "together", active=lambda runtime: runtime.adversary is not None),
    Step("transform", transforms.transform, active=lambda runtime: runtime.experiment.privacy.defends),
    Step("withhold", transforms.withhold, active=lambda runtime: runtime.experiment.privacy.noisy),
    Step("encrypt", protection.encrypt, keeps=protection.NEWEST, active=protection.encrypts),
    Step("witness", protection.show, "home", active=lambda runtime: runtime.witness is not None),
    Step("mask", protection.mask, "together", SESSION, protection.masks),
    Step("guard", transforms.look, "home", active=protection.sends_clear),
    Step("encode", protection.encode, "home", protection.RESIDUALS, protection.sends_clear),
]


def steps_of(runtime: ClientRuntime) -> list[Step]:
    """Return the steps that an experiment has, in order."""
    return [step for step in STEPS if step.active(runtime)]


def durable_keys(runtime: ClientRuntime) -> list[StateKey]:
    """Return the kinds of state that an experiment's clients keep from round to round."""
    return [key for key in _keys(steps_of(runtime)) if key.durable]


def contribute(runtime: ClientRuntime, contributions: Contributions, states: ClientStates) -> None:
    """Execute all steps for the clients of this process, one step after another."""
    execute(runtime, steps_of(runtime), contributions, states)


def execute(runtime: ClientRuntime, steps: Sequence[Step], contributions: Contributions, states: ClientStates) -> None:
    """Execute some steps, with the state that they keep."""
    load(steps, contributions, states)
    compute(runtime, steps, contributions)
    store(steps, contributions, states)


def load(steps: Sequence[Step], contributions: Contributions, states: ClientStates) -> None:
    """Load the clients' states into their contributions."""
    for key in _keys(steps):
        contributions.states[key.name] = [states.get(client, key) for client in contributions.clients]


def compute(runtime: ClientRuntime, steps: Sequence[Step], contributions: Contributions) -> None:
    """Execute steps whose state is loaded."""
    for step in steps:
        step.run(runtime, contributions)


def store(steps: Sequence[Step], contributions: Contributions, states: ClientStates) -> None:
    """Move the states from the contributions to the store, for clients that have not refused."""
    for key in _keys(steps):
        kept = contributions.states.pop(key.name)
        for k, client in contributions.standing():
            state = kept[k]
            if state is not None:
                states.put(client, key, state)


def _keys(steps: Sequence[Step]) -> list[StateKey]:
    return list(dict.fromkeys(step.keeps for step in steps if step.keeps is not None))
