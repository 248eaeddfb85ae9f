"""Tables of docs/differential-privacy.md that follow from the code: odds, mechanisms, what is refused, what sampling is worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from scipy.stats import norm

from fedveil import Experiment
from fedveil.core.catalog import MECHANISMS
from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.privacy.dp.accounting.accountants import calibrate, gaussian_epsilon, poisson_epsilon, subset_epsilon
from fedveil.server.rounds.sampling import Chance, Sampling

# clients, cohort, noise multiplier, rounds, delta
SAMPLED = (
    (1_000, 100, 1.0, 100, 1e-5),
    (10_000, 100, 0.8, 200, 1e-5),
    (1_000_000, 1_000, 0.6, 100, 1e-7),
)

# how the part of an error begins that says what works
ADVICE = ("use ", "set ", "take ", "give ", "it works ", "evaluate ")

NOISY = {"data.clients": 100, "federation.cohort": 20, "privacy.clip": 1.0, "privacy.epsilon": 3.0}
SERVER = {**NOISY, "privacy.noise_at": "server"}
SHARES = {**NOISY, "privacy.noise_at": "distributed"}
EXAMPLE = {**NOISY, "privacy.unit": "example"}
IN_SUMS = {**EXAMPLE, "privacy.noise_at": "server", "training.steps": 1}

# a preset, and settings of which each is refused with noise; in the order of the sections of the page
REFUSED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("digits", {"privacy.epsilon": 3.0}),
    ("digits", {**SERVER, "privacy.delta": 0.01}),
    ("sms-lstm", SERVER),
    ("digits", {**SERVER, "training.schedule": "plateau"}),
    ("digits", {**SERVER, "evaluation.federated": True, "data.validation_fraction": 0.1}),
    ("digits", {**SERVER, "privacy.leak_guard": "refuse"}),
    ("digits", {**SERVER, "communication.encoding": "int8"}),
    ("digits", {**NOISY, "privacy.clip": "adaptive"}),
    ("digits", {**SERVER, "privacy.noise": "banded"}),
    ("digits", {**SERVER, "privacy.noise": "banded", "federation.sampling": "order", "federation.cohort": 60}),
    ("digits", {**SERVER, "privacy.protection": "bfv"}),
    ("digits", {**NOISY, "privacy.protection": "bfv", "federation.sampling": "poisson"}),
    ("digits", SHARES),
    ("digits", {**SHARES, "privacy.protection": "ckks"}),
    (
        "digits",
        {
            **SHARES,
            "privacy.protection": "secagg",
            "privacy.distribution": "skellam",
            "federation.sampling": "poisson",
        },
    ),
    ("digits", {**SHARES, "privacy.epsilon": None, "privacy.noise_multiplier": 1.0, "privacy.protection": "bfv",
                "privacy.clip": 1e-5}),
    ("digits", {**IN_SUMS, "training.steps": 5}),
    ("digits", {**IN_SUMS, "training.optimizer": "adam"}),
    (
        "digits",
        {
            **IN_SUMS,
            "privacy.noise_at": "distributed",
            "privacy.protection": "secagg",
            "training.schedule": "cosine",
        },
    ),
    ("digits", {**EXAMPLE, "training.max_grad_norm": 1.0}),
    ("digits", {**IN_SUMS, "training.nesterov": True, "training.momentum": 0.9}),
    ("digits", {**IN_SUMS, "privacy.defence": "prune"}),
    ("digits", {**IN_SUMS, "communication.encoding": "float16"}),
    ("digits", {**IN_SUMS, "privacy.protection": "secagg", "training.schedule": "cosine"}),
    ("digits", {**SERVER, "federation.sampling": "poisson", "federation.quorum": 10}),
)  # fmt: skip


def odds_table() -> str:
    """What epsilon allows anybody, and what the best guess comes to against Gaussian noise of this epsilon."""
    rows = []
    for epsilon in (0.5, 1, 3, 8, 20):
        mu = 1 / calibrate(lambda z, most=epsilon: gaussian_epsilon(z, 1, 1e-5), epsilon)  # type: ignore[misc]
        odds = math.exp(epsilon)
        times = f"{odds:,.0f}" if odds > 100 else f"{odds:.3g}"
        named = norm.cdf(norm.ppf(0.01) + mu)  # the most powerful test of N(0, 1) against N(mu, 1)
        rows.append(
            f"| {epsilon:g} | {times} | {_percent(odds / (1 + odds))} | {_percent(norm.cdf(mu / 2))} | {_percent(named)} |"
        )
    head = (
        "| epsilon | odds change by, at most | from 50 % to, at most | best guess against Gaussian noise | of those who took part it "
        "names, at 1 % of the others |"
    )
    return "\n".join([head, "|---|---|---|---|---|", *rows]) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.999 else f"{100 * share:.2f} %" if share < 0.9999 else "over 99.99 %"


def mechanisms_table() -> str:
    """Every combination of noise: its settings and its guarantee, as `fedveil list mechanisms` says them."""
    rows = []
    for name, description in MECHANISMS.items():
        settings, _, guarantee = description.partition(": ")
        rows.append(f"| `{name}` | {settings} | {guarantee} |")
    return "\n".join(["| mechanism | settings of `[privacy]`, sampling | guarantee |", "|---|---|---|", *rows]) + "\n"


def refusals_table() -> str:
    """What is refused with noise, why, and what works instead, in the words of the errors."""
    rows = []
    for preset, settings in REFUSED:
        key, _, why = refusal(preset, settings).partition(": ")
        found, _, instead = why.partition("; ")
        if instead.startswith(ADVICE):
            why = found
        else:
            instead = ""
        rows.append(f"| `{key}` | {why} | {instead} |")
    return "\n".join(["| refused | because | instead |", "|---|---|---|", *rows]) + "\n"


def refusal(preset: str, settings: Mapping[str, Any]) -> str:
    """Return the error that settings are refused with; raise AssertionError where they are not."""
    try:
        Experiment.preset(preset).override(dict(settings))
    except SettingsError as error:
        return str(error)
    raise AssertionError(f"{preset} with {settings} is not refused")


def sampling_table() -> str:
    """Epsilon of the same noise by how cohorts are drawn."""
    rows = []
    for clients, cohort, multiplier, rounds, delta in SAMPLED:
        busiest, turns = _busiest(clients, cohort, rounds), math.ceil(rounds * cohort / clients)
        found = (
            poisson_epsilon(multiplier, cohort / clients, rounds, delta),
            subset_epsilon(multiplier, clients, cohort, rounds, delta),
            gaussian_epsilon(multiplier, busiest, delta),
            gaussian_epsilon(multiplier, turns, delta),
        )
        poisson, fixed, by_busiest, order = (
            f"{epsilon:.2f}" if epsilon < 10 else f"{epsilon:.1f}" for epsilon in found
        )
        rows.append(
            f"| {clients:,} | {cohort:,} | {multiplier:g} | {rounds} | {delta:g} | {poisson} | {fixed} | {by_busiest} ({busiest} "
            f"rounds) | {order} ({turns}) |"
        )
    head = (
        "| clients | cohort | z | rounds | delta | `poisson` | `fixed`, by sampling | `fixed`, by the busiest client | "
        "`order` |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows]) + "\n"


def _busiest(clients: int, cohort: int, rounds: int) -> int:
    """Return how often the client was asked that was asked most often, in one run with the seed 0."""
    sampling, asked = Sampling("fixed", clients, cohort), Counter[int]()
    for number in range(1, rounds + 1):
        asked.update(sampling.draw(range(1, clients + 1), number, Chance(Stream(0, number))))
    return max(asked.values())
