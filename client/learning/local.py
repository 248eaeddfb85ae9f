"""Local training and evaluation: steps that use a model on a client's own examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.metrics import Scores
from fedveil.models.local.correction import Correction
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.private import Draws, Private, seeded
from fedveil.models.local.training import train_clients
from fedveil.models.parameters import from_numpy
from fedveil.privacy.dp.examples import own_multiplier
from fedveil.privacy.dp.noise import secret_normal, secret_uniform


def measure(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Measure the loss of the received model on each client's training part, where the server asks for it."""
    if contributions.instructions.report_global_loss:
        contributions.global_loss = np.array(
            [score(runtime, client, contributions.given, held_out=False).loss for client in contributions.clients]
        )


def train(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Train the received model on each client's training part.

    The weights go into `contributions.weights` where the engine has set it, else into new arrays.
    """
    instructions, clients = contributions.instructions, contributions.clients
    if not contributions.weights:
        contributions.weights = {
            name: np.empty((len(clients), *value.shape), np.float32) for name, value in contributions.given.items()
        }
    mu = instructions.proximal_mu
    trained = train_clients(
        runtime.network,
        from_numpy(contributions.given, runtime.device),
        [runtime.federated.client(client)[0] for client in clients],
        runtime.experiment.training,
        instructions.learning_rate,
        [runtime.stream(instructions.round, client) for client in clients],
        classes=runtime.federated.dataset.task.labels,
        correction=None if mu is None else Correction(mu),
        together=runtime.vectorized,
        into=from_numpy(contributions.weights),
        room=runtime.room,
        private=_private(runtime, clients) if runtime.experiment.privacy.per_example else None,
    )
    contributions.examples, contributions.loss, contributions.steps = trained.examples, trained.loss, trained.steps


def _private(runtime: ClientRuntime, clients: Sequence[int]) -> Private:
    """Return what protects each example of the clients in their training."""
    experiment, sizes = runtime.experiment, runtime.federated.sizes(np.array(clients))
    clip = experiment.privacy.clip
    assert isinstance(clip, float)  # a mechanism's check
    deviations = np.array([own_multiplier(experiment, int(n)) for n in sizes])
    if not runtime.secret_noise:
        return Private(clip, deviations, seeded)
    return Private(clip, deviations, lambda _stream: Draws(secret_normal, secret_uniform))


def score(runtime: ClientRuntime, client: int, arrays: Mapping[str, np.ndarray], *, held_out: bool) -> Scores:
    """Evaluate a model on the client's held-out part, or on its training part."""
    training, validation = runtime.federated.client(client)
    examples = validation if held_out else training
    kind, parameters = runtime.experiment.training.loss, from_numpy(arrays, runtime.device)
    statistics = runtime.metrics.statistics if held_out else ()  # the training part needs its loss alone
    return evaluate(runtime.network, parameters, examples, kind, statistics=statistics)
