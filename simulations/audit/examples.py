"""Canaries among the examples of clients, for noise that hides one example: random inputs with random labels.

Each client holds as many; those whose coin says so are in its training part, and the others nowhere. A canary's score is
how far what was released moved down the gradient of its loss, taken at the model that the round began with: along that
gradient, shortened to the clip, each step moves that uses it. Steps of a round after the first have another gradient, which
costs some of the score and no proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task, join
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Count, Section
from fedveil.core.settings.sections import Data
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.federated import Federated, load
from fedveil.models.local.inputs import to_tensor
from fedveil.models.local.losses import loss
from fedveil.models.networks.build import build
from fedveil.models.parameters import from_numpy
from fedveil.models.parameters import load as put
from fedveil.simulations.audit.crowd import relabelled

STUDDED = f"{__name__}:studded"
TOGETHER = 500  # canaries whose gradients are in memory at once
RIDGE = 1.0  # of the scores: what canaries have in common, and with the clients' own examples, counts less
FIRST_WORD = 2  # after padding and unknown


class Studded(Section):
    """Settings of `studded`."""

    experiment: Annotated[str, Field(max_length=10**6)] = Field(description="the experiment, as TOML, whose data it is")
    canaries: Count = Field(description="how many examples each client may hold beside its own")


@part(Studded, uses=("clients",))
def studded(data: Data) -> DataSet:
    """Load the data of the audited experiment, with canaries among the training examples of each client."""
    settings = data.dataset.settings
    experiment = Experiment.parse(settings.experiment)
    federated = load(experiment.data, experiment.seed)
    canaries = draw(federated.dataset.task, data.clients, settings.canaries, experiment.seed)
    return relabelled(federated.dataset, WithExamples(federated, *canaries))


def draw(task: Task, clients: int, each: int, seed: int) -> tuple[Examples, np.ndarray]:
    """Draw canaries for all clients, and their coins, by the seed's own streams.

    Return examples [clients * each], those of one client after those of another, and bool [clients, each].
    Raise SettingsError for a task whose examples have no single label.
    """
    if task.predicts != "classification":
        raise SettingsError(
            f"audit: canary examples have one label, and the task is {task}; audit privacy.unit = 'client'"
        )
    number, stream = clients * each, Stream(seed)
    rng = stream.generator("audit examples")
    labels = rng.integers(0, task.labels, number)
    if task.kind == "text":  # one word, over and over: its vector takes most of the gradient
        words = rng.integers(FIRST_WORD, task.vocabulary_size, number).astype(np.int32)
        features: np.ndarray = np.repeat(words[:, None], task.shape[0], 1)
    else:
        features = rng.standard_normal((number, *task.shape), np.float32)
    included = stream.generator("audit coins").random((clients, each)) < 0.5
    return Examples(features, labels), included


@dataclass(frozen=True, eq=False)
class WithExamples:
    """The clients of `federated`, with canaries among their examples.

    canaries: examples [clients * each]; included: bool [clients, each]
    """

    federated: Federated
    canaries: Examples
    included: np.ndarray

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.included)

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Return the client's examples and all their row numbers, int64 [n]."""
        own, each = self.federated.client(client)[0], self.included.shape[1]
        rows = client * each + np.flatnonzero(self.included[client])
        held = join([own, self.canaries.take(rows)])
        return held, np.arange(len(held))

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each of the clients (int64 [m]): int64 [m]."""
        found: np.ndarray = self.federated.sizes(clients) + self.included[clients].sum(1)
        return found

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Return the number of examples of each class for each of the clients (int64 [m]): int64 [m, classes]."""
        return np.array([np.bincount(self.examples(int(k))[0].labels, minlength=classes) for k in clients])


@dataclass(frozen=True, eq=False)
class ExampleCanaries:
    """The canaries of a run among its clients' examples.

    examples, coins: as `draw` makes them; network: of the experiment; kind: of its loss
    scores: float64 [clients * each], as the rounds so far leave them; turns: nobody takes any
    """

    examples: Examples
    coins: np.ndarray
    network: nn.Module
    kind: str
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", np.zeros(self.coins.size))

    @classmethod
    def of(cls, experiment: Experiment, each: int) -> ExampleCanaries:
        """Draw the canaries that `studded` holds for an experiment."""
        task = load(experiment.data, experiment.seed).dataset.task
        examples, coins = draw(task, experiment.data.clients, each, experiment.seed)
        network = build(task, experiment.model, Stream(experiment.seed)).eval()
        return cls(examples, coins, network, experiment.training.loss)

    @property
    def included(self) -> np.ndarray:
        """The coins, bool [clients * each]."""
        return self.coins.reshape(-1)

    @property
    def turns(self) -> np.ndarray:
        """Nobody takes turns: a client's data is the same in all rounds."""
        return np.zeros(self.coins.size, bool)

    @property
    def lost(self) -> float:
        """What scores of canaries that take turns lose."""
        return 1.0

    def see_model(
        self,
        _number: int,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
        _asked: Sequence[int] | None = None,
    ) -> None:
        """Add what the models before and after a round tell of every canary to its score."""
        self._see(range(self.coins.size), before, after)

    def see_update(
        self, _number: int, client: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> None:
        """Add what one client's own answer tells of its canaries to their scores."""
        each = self.coins.shape[1]
        self._see(range(client * each, (client + 1) * each), before, after)

    def _see(self, canaries: range, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        put(self.network, from_numpy(before))
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        moved = np.concatenate(
            [np.subtract(after[name], before[name], dtype=np.float32).reshape(-1) for name in trained]
        )
        for start in range(canaries.start, canaries.stop, TOGETHER):
            some = range(start, min(start + TOGETHER, canaries.stop))
            directions = np.stack([self._direction(i, list(trained.values())) for i in some])
            alike = directions @ directions.T + RIDGE * np.eye(len(some), dtype=np.float32)
            self.scores[some.start : some.stop] -= np.linalg.solve(alike, directions @ moved)

    def _direction(self, i: int, trained: list[nn.Parameter]) -> np.ndarray:
        """Return the gradient of a canary's loss as one vector of norm 1, float32; zeros where there is none."""
        inputs = to_tensor(self.examples.features[i : i + 1], torch.device("cpu"))
        labels = torch.from_numpy(self.examples.labels[i : i + 1])
        value = loss(self.network(inputs), labels, self.kind)
        slopes = torch.autograd.grad(value, trained, materialize_grads=True)
        found = torch.cat([slope.flatten() for slope in slopes])
        length = float(found.norm())
        unit: np.ndarray = (found / length if length else found).numpy()
        return unit
