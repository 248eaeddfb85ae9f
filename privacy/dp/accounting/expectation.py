"""What accuracy to expect of noise, before a run begins: the noise of its mean updates beside the bound of one.

In the mean of a round, noise has a norm of r C, and what is learned one of C at most. Over T rounds what is learned adds
up to T C at most, and the noise to sqrt(T) r C: their ratio, r / sqrt(T), says how far training drowns. The bands below are
those of runs on digits and MNIST, with 10 to 1,000 clients, epsilon 1, 3 and 8, 10 and 40 rounds (docs/differential-privacy.md).
"""

from __future__ import annotations

import math

from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.accounting.mechanisms import steps_of

DROWNED, DEEP, SOME = 6.0, 3.0, 1.0  # of r / sqrt(T)


def drowning(experiment: Experiment, numbers: int, smallest: int = 0) -> float:
    """Return r / sqrt(T) of a calibrated experiment; 0 without noise.

    numbers: in a model; smallest: examples of the client that has the fewest, 0 where nobody knows
    """
    noise, steps = _noise_of_a_step(experiment, numbers, smallest)
    return noise / math.sqrt(steps)


def expectation(experiment: Experiment, numbers: int, guess: float, smallest: int = 0) -> str | None:
    """Return in words what accuracy to expect where the noise costs much of it, and what would help; None elsewhere.

    guess: the accuracy of naming the most frequent label
    """
    found = drowning(experiment, numbers, smallest)
    if found < SOME:
        return None
    if found >= DROWNED:
        said = f"expect no better than guessing, {guess:.2f}"
    elif found >= DEEP:
        said = f"expect half of what it would learn without, or less, down to guessing, {guess:.2f}"
    else:
        said = "expect clearly less than it would learn without: from nine tenths of that to a third"
    noise, _ = _noise_of_a_step(experiment, numbers, smallest)
    privacy, cohort = experiment.privacy, experiment.federation.cohort
    what, one = ("a step's mean gradient", "gradient") if privacy.per_example else ("a round's mean", "update")
    if privacy.noise_at == "client":
        helps = f"{math.ceil((found / SOME) ** 2 * cohort):,} clients a round would do, or noise in their sum alone"
        helps += " (privacy.noise_at)"
    else:
        helps = f"{math.ceil(found / SOME * cohort):,} clients a round would do"
    return (
        f"the noise in {what} has a norm of about {noise:,.{0 if noise >= 10 else 1}f} times the bound of one {one}, in which "
        f"training drowns: {said}; about {helps}, or a larger privacy.epsilon, or a smaller network"
    )


def _noise_of_a_step(experiment: Experiment, numbers: int, smallest: int) -> tuple[float, int]:
    """Return r, the norm of the noise in the mean of a step in units of C, and T, the steps; a step is a round of clients."""
    privacy, federation, training = experiment.privacy, experiment.federation, experiment.training
    parts, steps = float(federation.cohort), federation.rounds
    if privacy.noise_at == "client":
        parts = math.sqrt(parts)
    if privacy.per_example:
        size = smallest if training.batch_size == "full" else training.batch_size
        parts *= max(1, size)
        steps *= steps_of(experiment, smallest) if privacy.noise_at == "client" else 1
    return (privacy.multiplier if privacy.noisy else 0.0) * math.sqrt(numbers) / parts, steps
