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
    privacy, federation, training = experiment.privacy, experiment.federation, experiment.training
    if not privacy.noisy:
        return 0.0
    clients, steps = float(federation.cohort), federation.rounds
    if privacy.noise_at == "client":
        clients = math.sqrt(clients)
    if privacy.per_example:
        size = smallest if training.batch_size == "full" else training.batch_size
        clients *= max(1, size)
        steps *= steps_of(experiment, smallest) if privacy.noise_at == "client" else 1
    return privacy.multiplier * math.sqrt(numbers) / clients / math.sqrt(steps)


def expectation(experiment: Experiment, numbers: int, guess: float, smallest: int = 0) -> str | None:
    """Return in words what accuracy to expect where the noise costs much of it, and what would help; None elsewhere.

    guess: the accuracy of naming the most frequent label
    """
    found = drowning(experiment, numbers, smallest)
    if found < SOME:
        return None
    federation = experiment.federation
    times = found / SOME if experiment.privacy.noise_at != "client" else (found / SOME) ** 2
    if found >= DROWNED:
        said = f"expect no better than guessing, {guess:.2f}"
    elif found >= DEEP:
        said = f"expect half of what it would learn without, or less, down to guessing, {guess:.2f}"
    else:
        said = "expect clearly less than it would learn without: from nine tenths of that to a third"
    noise = found * math.sqrt(federation.rounds)
    return (
        f"the noise in a round's mean has a norm of about {noise:,.{0 if noise >= 10 else 1}f} times the bound of one update, in which training drowns: "
        f"{said}; about {math.ceil(times * federation.cohort):,} clients a round would do, or a larger privacy.epsilon, or a smaller network"
    )
