"""What differential privacy is claimed to cost, as data: budgets on real data, by whom the noise hides and who adds it."""

from __future__ import annotations

from typing import Any

from claims.presets import Claim, last

ACCURACY, F1 = last("test_accuracy"), last("test_f1")

# one client that holds all of MNIST: DP-SGD as if there were no federation, 20 passes; tanh, whose slopes are bounded
CENTRAL: dict[str, Any] = {
    "data.clients": 1, "federation.cohort": 1, "federation.rounds": 20, "model.hidden": [64, 64],
    "model.activation": "tanh", "model.initialization": "lecun", "training.epochs": 1, "training.batch_size": 2048,
    "training.learning_rate": 2.0, "training.momentum": 0.9, "training.schedule": "cosine",
    "privacy.unit": "example", "privacy.clip": 1.0, "evaluation.every": 20,
}  # fmt: skip
# 1,000 clients of 20 images each, with their own mix of digits
FEW: dict[str, Any] = {
    "data.client_examples": 20, "data.partition": "dirichlet", "data.partition.alpha": 0.5,
    "training.learning_rate": 0.1,
}  # fmt: skip
MANY = {"data.clients": 10_000, "federation.cohort": 200, "privacy.delta": 1e-5}
BANDED = {"federation.sampling": "order", "privacy.noise": "banded"}

PRIVATE = [
    Claim(
        "mnist-dp, epsilon 3", "mnist-dp", "test accuracy", ACCURACY, low=0.9, single=0.85,
        quick={"federation.rounds": 40}, needs_data="mnist",
    ),
    Claim(
        "mnist-dp, 20 images a client of their own mix, epsilon 3", "mnist-dp", "test accuracy", ACCURACY, low=0.83, single=0.7,
        settings=FEW, quick={"federation.rounds": 40}, needs_data="mnist",
    ),
    Claim(
        "mnist-dp, the same in turn, banded noise, epsilon 3", "mnist-dp", "test accuracy", ACCURACY,
        low=0.84, single=0.7, settings=FEW | BANDED, quick={"federation.rounds": 40}, needs_data="mnist",
    ),
    Claim(
        "mnist-dp, 10,000 clients of 6 images, epsilon 3", "mnist-dp", "test accuracy", ACCURACY, low=0.875, single=0.8,
        settings=MANY, quick={"federation.rounds": 30}, needs_data="mnist",
    ),
    *(
        Claim(
            f"mnist-mlp, one client, each example hidden, epsilon {epsilon:g}", "mnist-mlp", "test accuracy", ACCURACY,
            low=low, single=0.85, settings={**CENTRAL, **more, "privacy.epsilon": epsilon},
            quick={"federation.rounds": 5}, needs_data="mnist",
        )
        for epsilon, low, more in (
            (1.0, 0.91, {"training.learning_rate": 1.0}), (3.0, 0.94, {}), (8.0, 0.955, {"federation.rounds": 40}),
        )
    ),
    Claim("sms-bag-dp, epsilon 3", "sms-bag-dp", "F1 on spam", F1, low=0.83, single=0.7, needs_data="sms"),
    Claim(
        "digits-dp, shares of noise under secagg, epsilon 7", "digits-dp", "test accuracy", ACCURACY,
        low=0.86, single=0.7, quick={"federation.rounds": 6},
    ),
]  # fmt: skip
