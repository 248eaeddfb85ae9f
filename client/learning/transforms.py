"""Steps between training and protection, which change an update or inspect it before it is sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.errors import ProtectionError
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.defences import defend
from fedveil.privacy.dp.noise import clip_rows
from fedveil.privacy.leakage.guard import reveals

log = logging.getLogger("fedveil.guard")  # not Flower's, which simulations keep quiet
GUARDS = ("off", "warn", "refuse")


def corrupt(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Let the simulation's adversary see and change the cohort's contributions."""
    assert runtime.adversary is not None  # else the step is not active
    runtime.adversary(contributions)


def transform(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Apply the defence, clipping and noise of the settings to each update."""
    privacy, instructions = runtime.experiment.privacy, contributions.instructions
    if instructions.clip is not None:
        if privacy.defence.name != "none":
            _defend(runtime, contributions, privacy.model_copy(update={"clip": None}))
        lengths = clip_rows(contributions.given, contributions.weights, instructions.clip)
        contributions.within = lengths <= instructions.clip
        return
    clips_alone = privacy.noisy and (privacy.noise_at == "server" or privacy.protected)
    if clips_alone and privacy.defence.name == "none" and privacy.bound is not None:
        clip_rows(contributions.given, contributions.weights, privacy.bound)
        return
    _defend(runtime, contributions, privacy)


def _defend(runtime: ClientRuntime, contributions: Contributions, privacy: Privacy) -> None:
    number = contributions.instructions.round
    for k, client in contributions.standing():
        stream = runtime.stream(number, client)
        changed = defend(privacy, contributions.given, contributions.of(k), stream, secret=runtime.secret_noise)
        for name, value in changed.items():
            contributions.weights[name][k] = value


def withhold(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Report nothing of the data but the noisy update.

    Each client counts as one example, and reports neither a loss nor its steps.
    """
    contributions.examples = np.ones_like(contributions.counts())
    contributions.loss = contributions.global_loss = contributions.steps = None


def look(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Inspect each client's update for what it reveals of examples; refuse it or warn of it.

    The settings and the client's owner say which.
    """
    for k, client in contributions.standing():
        try:
            guard(runtime, client, contributions.given, contributions.of(k))
        except ProtectionError as error:
            contributions.refusals[k] = error


def guard(
    runtime: ClientRuntime, client: int, given: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]
) -> None:
    """Attack a client's update with fast attacks, and tell only the operator what it reveals.

    given: the model that the client was sent; weights: those that it would send, after defence, clipping and noise
    Raise ProtectionError where they must not be sent.
    """
    how = max(runtime.experiment.privacy.leak_guard, runtime.leak_guard, key=GUARDS.index)
    if how == "off":
        return
    found = reveals(given, weights, runtime.federated.client(client)[0], runtime.federated.dataset.task)
    if not found.anything:
        return
    log.warning("client %d: %s%s", client, found, "; it is not sent" if how == "refuse" else "")
    if how == "refuse":
        raise ProtectionError(
            "leak_guard = 'refuse': the client's own guard kept its update back, as it reveals examples"
        )
