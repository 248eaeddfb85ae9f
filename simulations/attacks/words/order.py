"""The sentence, in order, from the update of an LSTM on one text.

The rows of the word table show the words (`words.py`). Two things show their order. First, the gradient of a word grows
with its position, as it passes through fewer steps on its way to the last state; that gives an initial order. Second,
only the right order gives the whole update: words are moved, one at a time, to where the simulated update is closest to
the observed one by cosine, as Balunovic et al. 2022, "LAMP: Extracting Text from Gradients with Language Model Priors"
(discrete optimization), move the tokens of a transformer's text.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models import parameters as weights
from fedveil.models.local.training import train_clients
from fedveil.models.networks.words import Words
from fedveil.models.vectorized.batched import Chain, batched
from fedveil.models.vectorized.functional import Functional
from fedveil.privacy.leakage import words
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation

# what a gradient is compared with: only the direction counts
STEP = Training(batch_size="full", learning_rate=1.0)
BETTER = 1e-12  # gain in cosine, above which a move counts


def read(observation: Observation, known: Known, _stream: Stream) -> list[int]:
    """Return the ids of the words of the text, each once, in order."""
    assert observation.before is not None
    assert observation.update is not None
    table = words.find(observation.before, known.task.vocabulary_size)
    assert table is not None
    change = observation.update[table]
    found = words.moved(observation.before[table], change)
    if len(found) < 2:
        return list(found.tolist())
    trial = Trial(observation, known, table, found)
    start = np.argsort(np.linalg.norm(change[found], axis=1), kind="stable")
    best, _ = max((climb(trial, start, label) for label in range(len(known.task.classes))), key=lambda end: end[1])
    return list(found[best].tolist())


class Trial:
    """A copy of the network with only the words found, which trains on orders of them and compares the updates."""

    def __init__(self, observation: Observation, known: Known, table: str, found: np.ndarray) -> None:
        assert observation.before is not None
        assert observation.update is not None
        rows = np.concatenate([[words.PADDING], found])
        self._before = {
            name: (values[rows] if name == table else values).astype(np.float32)
            for name, values in observation.before.items()
        }
        seen = {name: values[rows] if name == table else values for name, values in observation.update.items()}
        self._seen = torch.cat([torch.from_numpy(np.asarray(seen[name], np.float64)).ravel() for name in self._before])
        self._sign = -1.0 if observation.kind == "gradient" else 1.0
        self._network = _with_words(known.network, table, len(rows))
        self._training = observation.training if observation.training and observation.kind != "gradient" else STEP
        self._classes = len(known.task.classes)
        ids = torch.arange(1, len(rows)).repeat(2, 1)
        how = batched(self._network, ids)
        self._together: Chain | Functional | None = None if isinstance(how, str) else how

    def cosines(self, orders: np.ndarray, label: int) -> np.ndarray:
        """Return the cosine of each order's update with the observed one, float64 [k].

        orders: positions among the words found, int64 [k, n]; label: of the text
        """
        label_of = np.array([label])
        texts = [Examples((order[None] + 1).astype(np.int32), label_of) for order in orders]
        trained = train_clients(
            self._network, weights.from_numpy(self._before), texts, self._training, self._training.learning_rate,
            [Stream(0)] * len(texts), classes=self._classes, together=self._together,
        ).parameters  # fmt: skip
        made = self._sign * torch.cat([self._change(name, trained) for name in self._before], dim=1)  # [k, weights]
        norms = made.norm(dim=1) * self._seen.norm()
        cosines: np.ndarray = (made @ self._seen / norms.clamp(min=1e-300)).numpy()
        return cosines

    def _change(self, name: str, trained: dict[str, Tensor]) -> Tensor:
        return (trained[name].double() - torch.from_numpy(self._before[name]).double()).flatten(1)


def climb(trial: Trial, start: np.ndarray, label: int) -> tuple[np.ndarray, float]:
    """Move each word to its best position until none moves; return the order and its cosine."""
    order, best = start, float(trial.cosines(start[None], label)[0])
    improved = True
    while improved:
        improved = False
        for word in start:
            moves = _moves(order, int(word))
            cosines = trial.cosines(moves, label)
            if cosines.max() > best + BETTER:
                order, best, improved = moves[int(cosines.argmax())], float(cosines.max()), True
    return order, best


def _moves(order: np.ndarray, word: int) -> np.ndarray:
    """Return the orders in which one word stands elsewhere, [n - 1, n]."""
    rest = order[order != word]
    here = int(np.flatnonzero(order == word)[0])
    return np.array([np.insert(rest, place, word) for place in range(len(order)) if place != here])


def _with_words(network: nn.Module, table: str, rows: int) -> nn.Module:
    """Copy the network with a word table of `rows` rows, and without dropout, whose draws are not known."""
    small = copy.deepcopy(network)
    owner = small.get_submodule(table.rpartition(".")[0])
    assert isinstance(owner, Words)
    owner.weight = nn.Parameter(owner.weight.detach()[:rows].clone())
    owner.num_embeddings = rows
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    return small


def suits(known: Known) -> str | None:
    """Return why no order can be recovered, or None: the data are no text, or the network ignores word order."""
    if known.task.kind != "text":
        return f"the data are {known.task.kind}, and it reads sentences; take a preset of text, such as sms-lstm"
    modules = list(known.network.modules())
    if not any(isinstance(module, nn.RNNBase) for module in modules):
        return "the network has no recurrent layer: it adds word vectors up, whatever their order; take model.name = 'lstm'"
    if sum(isinstance(module, Words) for module in modules) != 1:
        return "the network has no fedveil.models.networks.words.Words, the word table that it can cut down to the words found"
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the order, or None: several texts, unknown training, or dropout."""
    if observation.examples is not None and observation.examples > 1:
        return f"the update is of {observation.examples} texts, and it looks for the order of one"
    if observation.training is None and observation.kind != "gradient":
        return "how clients train is not known: one step of SGD is assumed, which several steps and Adam are not like"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in known.network.modules()):
        return "dropout is each client's own, and its training is done again without: some words come out of order"
    return None


ORDER = Attack(
    run=read,
    recovers="sentence",
    needs=("update", "single client", "single example"),
    suits=suits,
    warn=warn,
    cost="a second for a sentence of 12 words",
    cites="Melis et al. 2019, section 4.1; Balunovic et al. 2022 (LAMP)",
)
