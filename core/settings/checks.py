"""Combinations of settings that cannot work; they are refused before a run starts, with keys and alternatives."""

from __future__ import annotations

from collections.abc import Callable

from fedveil.core.catalog import MECHANISMS, METRICS, PROTECTIONS, STRATEGIES
from fedveil.core.errors import SettingsError
from fedveil.core.settings.sections import Federation, Privacy, Settings

ORDER = ("sum", "mean", "each")  # what a strategy may need to see, from least to most


def check_combinations(e: Settings) -> None:
    """Raise SettingsError where settings that are valid one by one cannot work together.

    A user's part in settings from another machine is not imported here; it is checked when it is used.
    """
    for name in e.evaluation.metrics or ():
        METRICS.check(name, "evaluation.metrics")
    training, federation = e.training, e.federation

    def refuse(when: bool, message: str) -> None:
        if when:
            raise SettingsError(message)

    refuse(
        federation.cohort > e.data.clients,
        f"federation.cohort = {federation.cohort}: larger than the population; data.clients = {e.data.clients}",
    )
    refuse(
        training.optimizer != "sgd" and training.momentum > 0,
        f"training.momentum = {training.momentum}: only sgd takes momentum; training.optimizer = '{training.optimizer}' has its own",
    )
    refuse(
        training.nesterov and (training.optimizer != "sgd" or training.momentum == 0),
        "training.nesterov = true: needs training.optimizer = 'sgd' and training.momentum above 0",
    )
    refuse(
        training.schedule in ("cosine", "cyclic", "plateau") and training.schedule_minimum >= training.learning_rate,
        f"training.schedule_minimum = {training.schedule_minimum}: must be smaller than "
        f"training.learning_rate = {training.learning_rate}, the highest of the schedule",
    )
    refuse(
        e.evaluation.federated and e.data.validation_fraction == 0,
        "evaluation.federated = true: clients need a part to evaluate on; set data.validation_fraction, 0.1 say",
    )
    refuse(
        (e.evaluation.cohort or 1) > e.data.clients,
        f"evaluation.cohort = {e.evaluation.cohort}: larger than the population; data.clients = {e.data.clients}",
    )
    _check_protection(e, refuse)
    _check_noise(e, refuse)
    if e.federation.strategy.resolved:
        _check_shown(e, refuse)
    for choice in (
        e.data.dataset,
        e.data.partition,
        e.model,
        e.federation.strategy,
        e.privacy.protection,
        e.privacy.defence,
    ):
        check = choice.declaration.check if choice.resolved else None
        if check is not None:
            check(choice.settings, e)


def _check_protection(e: Settings, refuse: Callable[[bool, str], None]) -> None:
    """Refuse settings that cannot work with protected updates."""
    if not e.privacy.protected:
        return
    protection = e.privacy.protection.name
    refuse(
        e.communication.encoding != "float32",
        f"communication.encoding = '{e.communication.encoding}': cannot work with privacy.protection = '{protection}', whose "
        "updates have a form of their own; leave it at 'float32'",
    )
    refuse(
        e.privacy.leak_guard != "off",
        f"privacy.leak_guard = '{e.privacy.leak_guard}': looks at updates in the clear, and privacy.protection = '{protection}' "
        "sends none",
    )
    refuse(
        e.federation.cohort < e.privacy.protection.min_clients,
        f"federation.cohort = {e.federation.cohort}: an aggregate of fewer than privacy.protection.min_clients = "
        f"{e.privacy.protection.min_clients} says too much about each of them; {protection} needs a larger cohort",
    )


def _check_shown(e: Settings, refuse: Callable[[bool, str], None]) -> None:
    """Refuse a strategy that needs to see more of the updates than the protection and the noise allow."""
    strategy, privacy, shows = e.federation.strategy, e.privacy, e.privacy.shows
    most = "mean" if privacy.noisy and shows == "each" else shows  # the privacy accounting covers the plain mean alone
    declared = strategy.declaration
    if ORDER.index(declared.needs) <= ORDER.index(most):
        return
    able = ", ".join(
        name
        for name in STRATEGIES
        if ORDER.index(STRATEGIES.declared(name, "federation.strategy").needs) <= ORDER.index(most)
    )
    start = f"federation.strategy = '{strategy}': cannot work with "
    refuse(
        shows == "each",
        f"{start}noise (privacy.epsilon, privacy.noise_multiplier), which is accounted for the plain mean of updates\n"
        f"  can: {able}",
    )
    why = f"{declared.why}, and the server sees only their sum"
    if not declared.why:
        why = "FedVeil cannot know that it needs no more than their sum"
    elif declared.needs == "mean":
        opening = [name for name in PROTECTIONS if PROTECTIONS.declared(name, "privacy.protection").needs == "mean"]
        named = " or ".join(f"'{name}'" for name in opening)
        why = f"{declared.why}, which is a ciphertext here; privacy.protection = {named} opens the mean"
    refuse(True, f"{start}privacy.protection = '{privacy.protection}': {why}\n  can: {able}")


def _check_noise(e: Settings, refuse: Callable[[bool, str], None]) -> None:
    """Refuse noise whose differential privacy guarantee would not hold, or that nothing can add."""
    privacy = e.privacy
    refuse(
        privacy.epsilon is not None and privacy.noise_multiplier > 0,
        f"privacy.epsilon = {privacy.epsilon}, privacy.noise_multiplier = {privacy.noise_multiplier:g}: a budget decides how much "
        "noise there is; give one of them (--set privacy.noise_multiplier= takes the other away)",
    )
    refuse(
        privacy.clip == "adaptive" and not privacy.noisy,
        "privacy.clip = 'adaptive': the bound follows a noisy count of updates, and there is no noise; set privacy.epsilon, or "
        "privacy.noise_multiplier, or give privacy.clip a number",
    )
    if privacy.noisy:
        MECHANISMS.load(mechanism_of(privacy, e.federation), "privacy").check(e)


def mechanism_of(privacy: Privacy, federation: Federation) -> str:
    """Return the name of the mechanism that the settings of noise describe, of `fedveil list mechanisms`."""
    if privacy.unit == "example" or privacy.noise_at == "distributed":
        return f"{privacy.unit}-{privacy.noise_at}"
    if privacy.noise_at == "client":
        return "client-sum" if privacy.protected else "client-clear"
    return f"server-{'banded' if privacy.noise == 'banded' else federation.sampling}"
