"""What the attacks that take milliseconds reach on real data; a few trials in `make test`, all in `make claims`.

Each function makes its victims itself, as `slow_attacks` does: independent clients, the product's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from claims.slow_attacks import decibels, draw, fresh, images, known_of, mean_of, messages, observe
from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.datasets.dataset import DataSet
from fedveil.models.local.training import train_clients
from fedveil.simulations.attacks.images.first_layer import FIRST_LAYER
from fedveil.simulations.attacks.images.spear import SPEAR
from fedveil.simulations.attacks.lab.attack import Attack, launch
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.lab.scoring import Score, Truth, score_labels, score_words
from fedveil.simulations.attacks.labels import LABELS
from fedveil.simulations.attacks.words.order import ORDER
from fedveil.simulations.attacks.words.words import WORDS

MLP = Model(hidden=(64, 64))  # of the preset mnist-mlp
POOLED = Model(name="mlp", embedding=32, hidden=(32,))
LSTM = Model(name="lstm", embedding=32, units=64)
LAST = Model(**LSTM.dump() | {"pooling": "last"})
STEP = Training(batch_size="full", learning_rate=0.1)
TRAINING = {
    "images": Training(epochs=3, batch_size=64),
    "text": Training(epochs=2, optimizer="adam", learning_rate=2e-3),
}


def trained(known: Known, dataset: DataSet, seed: int) -> dict[str, Tensor]:
    """Weights after some epochs on examples that `draw` gives no client."""
    rows = np.random.default_rng(seed).permutation(len(dataset.train))[
        -9000 if known.task.kind == "images" else -2000 :
    ]
    training = TRAINING[known.task.kind]
    done = train_clients(
        known.network, fresh(known, seed), [dataset.train.take(rows)], training, training.learning_rate, [Stream(seed)],
        classes=len(known.task.classes),
    )  # fmt: skip
    return {name: tensor[0].clone() for name, tensor in done.parameters.items()}


def victims(
    dataset: DataSet, model: Model, training: Training, seed: int, clients: Sequence[Examples], learnt: bool = False
) -> tuple[Known, list[Observation]]:
    """What the server sees of clients that train the same model, fresh or trained."""
    known = known_of(dataset, model)
    before = trained(known, dataset, seed) if learnt else fresh(known, seed)
    return known, observe(known, before, clients, training, seed)


def words(
    model: Model, training: Training, seed: int, clients: int, batch: int = 1, learnt: bool = False
) -> list[Score]:
    """Scores of the words of each client's messages."""
    drawn = draw(messages(), seed, clients, batch)
    known, seen = victims(messages(), model, training, seed, drawn, learnt)
    found = [launch("words", WORDS, each, known, Stream(seed)) for each in seen]
    return [score_words(each, Truth(client), known.task) for each, client in zip(found, drawn, strict=True)]


def mean(scores: Sequence[Score], metric: str) -> float:
    """Over clients."""
    return float(np.mean([score[metric] for score in scores]))


def short(n: int, seed: int) -> list[Examples]:
    """Clients of one message each, of 5 to 12 words that are all distinct."""
    ids = messages().train.features
    lengths = (ids > 0).sum(axis=1)
    distinct = np.array([len(np.unique(row[row > 0])) for row in ids])
    rows = np.flatnonzero((lengths == distinct) & (lengths >= 5) & (lengths <= 12))
    return [
        messages().train.take(np.array([row])) for row in np.random.default_rng(seed).choice(rows, n, replace=False)
    ]


def sentences(model: Model, training: Training, seed: int, clients: int, learnt: bool = False) -> float:
    """The share of messages that are found whole and in order."""
    drawn = short(clients, seed)
    known, seen = victims(messages(), model, training, seed, drawn, learnt)
    found = [launch("order", ORDER, each, known, Stream(seed)) for each in seen]
    true = [client.features[0][client.features[0] > 0].tolist() for client in drawn]
    return float(np.mean([each == words for each, words in zip(found, true, strict=True)]))


def pictures(
    attack: Attack, training: Training, seed: int, clients: int, batch: int = 1, learnt: bool = False
) -> np.ndarray:
    """dB of each image, [clients, batch]."""
    drawn = draw(images(), seed, clients, batch)
    known, seen = victims(images(), MLP, training, seed, drawn, learnt)
    found = [launch("images", attack, each, known, Stream(seed)) for each in seen]
    return np.stack([decibels(each, client) for each, client in zip(found, drawn, strict=True)])


def together(attack: Attack, seed: int, groups: int, clients: int) -> np.ndarray:
    """dB of each image in the mean of clients of one image each, [groups, clients]; one step on a fresh network."""
    drawn = draw(images(), seed, groups * clients, 1)
    known, seen = victims(images(), MLP, STEP, seed, drawn)
    found = []
    for first in range(0, len(seen), clients):
        group = drawn[first : first + clients]
        truth = Examples(
            np.concatenate([each.features for each in group]), np.concatenate([each.labels for each in group])
        )
        mean_update = mean_of(seen[first : first + clients])
        found.append(decibels(launch("images", attack, mean_update, known, Stream(seed)), truth))
    return np.stack(found)


def labels(
    training: Training, seed: int, clients: int, batch: int = 1, learnt: bool = False, like: bool = True
) -> list[Score]:
    """Scores of the counts of each client's labels; like: whether the observer has examples like the clients'."""
    drawn = draw(images(), seed, clients, batch)
    known, seen = victims(images(), MLP, training, seed, drawn, learnt)
    known = known if like else replace(known, auxiliary=None)
    found = [launch("labels", LABELS, each, known, Stream(seed)) for each in seen]
    return [score_labels(each, Truth(client), known.task) for each, client in zip(found, drawn, strict=True)]


def full(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, list[float]]:
    """Every figure with all its trials, one a seed: what is claimed of the fast attacks.

    60 messages, sentences or images of each kind a seed, or 20 batches.
    """
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(float(value))

    decayed = {"weight_decay": 1e-4}
    for seed in seeds:
        for epochs in (1, 5):
            for batch in (1, 8, 32):
                scores = words(
                    POOLED, STEP.model_copy(update={"epochs": epochs}), seed, 60 if batch == 1 else 20, batch
                )
                add(f"words, mean-pool, batch {batch}, E = {epochs}: recall", mean(scores, "recall"))
                add(f"words, mean-pool, batch {batch}, E = {epochs}: precision", mean(scores, "precision"))
                if batch == 1:
                    add(f"words, mean-pool, batch 1, E = {epochs}: counted", mean(scores, "counted"))
        for name, model in {"LSTM, mean of states": LSTM, "LSTM, last state": LAST}.items():
            for learnt in (False, True):
                scores = words(model, STEP, seed, 60, learnt=learnt)
                add(f"words, {name}{', trained' * learnt}: recall", mean(scores, "recall"))
                add(f"words, {name}{', trained' * learnt}: precision", mean(scores, "precision"))
                exact = sentences(model, STEP, seed, 60, learnt)
                add(f"order, {name}{', trained' * learnt}: exact", exact)
        for name, model in {"mean-pool": POOLED, "LSTM, mean of states": LSTM, "LSTM, last state": LAST}.items():
            scores = words(model, STEP.model_copy(update=decayed), seed, 60)
            add(f"words, {name}, weight decay: recall", mean(scores, "recall"))
            add(f"words, {name}, weight decay: precision", mean(scores, "precision"))
        for learnt in (False, True):
            what = "trained" if learnt else "fresh"
            alone = pictures(FIRST_LAYER, STEP, seed, 60, learnt=learnt)
            add(f"first layer, {what}, batch 1: least dB", alone.min())
            add(f"first layer, {what}, batch 1: median dB", np.median(alone))
            add(
                f"first layer, {what}, batch 8: share above 30 dB",
                (pictures(FIRST_LAYER, STEP, seed, 20, 8, learnt) > 30).mean(),
            )
            for batch in (4, 8, 12):
                exact = (pictures(SPEAR, STEP, seed, 20, batch, learnt) > 60).mean()
                add(f"spear, {what}, batch {batch}: share above 60 dB", exact)
            for batch in (1, 8, 32):
                scores = labels(STEP, seed, 60 if batch == 1 else 20, batch, learnt)
                add(f"labels, {what}, batch {batch}: exact", mean(scores, "exact"))
                add(f"labels, {what}, batch {batch}: accuracy", mean(scores, "accuracy"))
        add("first layer, mean of 8 clients: share above 60 dB", (together(FIRST_LAYER, seed, 20, 8) > 60).mean())
        add("spear, mean of 8 clients: share above 60 dB", (together(SPEAR, seed, 20, 8) > 60).mean())
        add(
            "labels, fresh, batch 8, nothing like the examples: accuracy",
            mean(labels(STEP, seed, 20, 8, like=False), "accuracy"),
        )
    return rows
