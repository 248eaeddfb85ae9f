"""What gradient matching, imprint and membership attacks reach on real data; a few trials in `make test`, all in `make claims`.

Each function makes its victims itself: clients of independent images or messages, a fresh model, the product's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from torch import Tensor

from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Data, Training
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.published.images import mnist
from fedveil.datasets.text import sms
from fedveil.models import parameters as weights
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build, example
from fedveil.models.vectorized.batched import batched
from fedveil.simulations.attacks.images.dlg import DLG, IDLG
from fedveil.simulations.attacks.images.imprint import IMPRINT
from fedveil.simulations.attacks.images.matching import run_many
from fedveil.simulations.attacks.lab.attack import Attack, launch
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.lab.scoring import Score, Truth, matched, score_members
from fedveil.simulations.attacks.membership.coverage import COVERAGE
from fedveil.simulations.attacks.membership.lira import LIRA, LIRA_OFFLINE
from fedveil.simulations.attacks.membership.membership import COSINE, LOSS, LOSS_DIFFERENCE

MLP = Model(hidden=(64, 64))  # of the preset mnist-mlp
LSTM = Model(name="lstm", embedding=32, units=64, pooling="last", dropout=0.3)  # of the preset sms-lstm
OVERFIT = Training(epochs=20, batch_size=10, learning_rate=0.1)
HELD = 100  # examples of a client whose members are asked for
MEMBERSHIP = {"loss": LOSS, "difference": LOSS_DIFFERENCE, "cosine": COSINE, "lira": LIRA, "offline": LIRA_OFFLINE}


@cache
def images() -> DataSet:
    """MNIST."""
    return mnist(Data(dataset="mnist"))


@cache
def messages() -> DataSet:
    """The text messages, without repeats."""
    return sms(Data(dataset="sms"))


def known_of(dataset: DataSet, model: Model) -> Known:
    """What everybody may know; the test part stands for examples like the victims'."""
    network = build(dataset.task, model, Stream(0))
    return Known(dataset.task, model, network, words=dataset.words, auxiliary=dataset.test)


def fresh(known: Known, seed: int) -> dict[str, Tensor]:
    """Initial weights."""
    return weights.get(build(known.task, known.model, Stream(seed)))


def observe(
    known: Known, before: dict[str, Tensor], clients: Sequence[Examples], training: Training, seed: int
) -> list[Observation]:
    """What the server sees of each client: float32 weights, and their difference in float64."""
    how = batched(known.network, example(known.task))
    trained = train_clients(
        known.network, before, clients, training, training.learning_rate,
        [Stream(seed, 1, client) for client in range(len(clients))], classes=len(known.task.classes),
        together=None if isinstance(how, str) else how,
    )  # fmt: skip
    sent, after = weights.to_numpy(before), weights.to_numpy(trained.parameters)
    return [
        Observation(
            "server", 1, "delta", sent,
            {name: after[name][k].astype(np.float64) - sent[name].astype(np.float64) for name in sent},
            examples=len(client), training=training,
        )
        for k, client in enumerate(clients)
    ]  # fmt: skip


def mean_of(observations: Sequence[Observation]) -> Observation:
    """What an observer of the aggregate sees of clients with as many examples each."""
    updates = [observation.update or {} for observation in observations]
    mean = {name: np.mean([update[name] for update in updates], axis=0) for name in updates[0]}
    together = sum(observation.examples or 0 for observation in observations)
    return replace(observations[0], kind="aggregate", clients=len(observations), examples=together, update=mean)


def draw(dataset: DataSet, seed: int, clients: int, each: int) -> list[Examples]:
    """Clients of different training examples."""
    rows = np.random.default_rng(seed).permutation(len(dataset.train))[: clients * each]
    return [dataset.train.take(some) for some in rows.reshape(clients, each)]


def decibels(found: np.ndarray, true: Examples) -> np.ndarray:
    """PSNR of each true image, best matched; where none is left, that of black."""
    return np.array([max(value, 0.0) for _, value in matched(found, true.features)])


def matching(seed: int, batches: int, batch: int, epochs: int = 1, model: Model = MLP, **limits: int) -> np.ndarray:
    """dB of each image by gradient matching, [batches, batch]; full-batch steps on a fresh network."""
    known, clients = known_of(images(), model), draw(images(), seed, batches, batch)
    training = Training(epochs=epochs, batch_size="full", learning_rate=0.2)
    seen = observe(known, fresh(known, seed), clients, training, seed)
    found = run_many(seen, known, [Stream(seed, 1, k) for k in range(batches)], **limits)
    return np.stack([decibels(each, client) for each, client in zip(found, clients, strict=True)])


def deep_leakage(seed: int, batches: int, batch: int, activation: str, attack: Attack = DLG) -> np.ndarray:
    """dB of each image by DLG or iDLG, [batches, batch]; one step on a fresh network."""
    known = known_of(images(), Model(**MLP.dump() | {"activation": activation}))
    clients = draw(images(), seed, batches, batch)
    seen = observe(known, fresh(known, seed), clients, Training(batch_size="full", learning_rate=0.2), seed)
    found = [launch("dlg", attack, each, known, Stream(seed, 1, k)) for k, each in enumerate(seen)]
    return np.stack([decibels(each, client) for each, client in zip(found, clients, strict=True)])


def imprint(
    seed: int, batches: int, batch: int = 64, hidden: tuple[int, ...] = (256, 64), training: Training | None = None
) -> np.ndarray:
    """dB of each image that clients trained on where the server made the model up, [batches, batch]; one step of all images."""
    assert IMPRINT.craft is not None
    known, clients = known_of(images(), Model(hidden=hidden)), draw(images(), seed, batches, batch)
    sent = IMPRINT.craft(weights.to_numpy(fresh(known, seed)), known, Stream(seed))
    training = training or Training(batch_size="full", learning_rate=0.1)
    seen = observe(known, weights.from_numpy(sent), clients, training, seed)
    found = [launch("imprint", IMPRINT, replace(each, crafted=True), known, Stream(seed)) for each in seen]
    return np.stack([decibels(each, client) for each, client in zip(found, clients, strict=True)])


def members(
    dataset: DataSet, model: Model, training: Training, attacks: dict[str, Attack], seed: int, clients: int
) -> dict[str, list[Score]]:
    """Scores of each attack for each client, and of those that can on the clients' mean ("global loss" and so on)."""
    known = known_of(dataset, model)
    drawn = draw(dataset, seed, 2 * clients, HELD)
    held, others = drawn[:clients], drawn[clients:]
    seen = observe(known, fresh(known, seed), held, training, seed)
    scores: dict[str, list[Score]] = {name: [] for name in attacks}
    for k, observation in enumerate(seen):
        asked, truth = _candidates([held[k]], [others[k]], Stream(seed, client=k))
        for name, attack in attacks.items():
            found = launch(name, attack, observation, replace(known, candidates=asked), Stream(seed, 1, k))
            scores[name].append(score_members(found, truth, known.task))
    asked, truth = _candidates(held, others, Stream(seed))
    for name, attack in attacks.items():
        if "single client" not in attack.needs:
            found = launch(name, attack, mean_of(seen), replace(known, candidates=asked), Stream(seed, 1))
            scores[f"global {name}"] = [score_members(found, truth, known.task)]
    return scores


def coverage(seed: int, clients: int, model: Model = LSTM) -> list[Score]:
    """Scores of word coverage for each client of 100 messages, after five epochs of Adam."""
    training = Training(epochs=5, batch_size=16, optimizer="adam", learning_rate=0.01)
    return members(messages(), model, training, {"coverage": COVERAGE}, seed, clients)["coverage"]


def mean(scores: Sequence[Score], metric: str = "auc") -> float:
    """Over clients."""
    return float(np.mean([score[metric] for score in scores]))


def _candidates(held: Sequence[Examples], others: Sequence[Examples], stream: Stream) -> tuple[Examples, Truth]:
    """Members and as many others, in random order."""
    parts = [*held, *others]
    both = Examples(np.concatenate([part.features for part in parts]), np.concatenate([part.labels for part in parts]))
    order = stream.generator("order of candidates").permutation(len(both))
    return both.take(order), Truth(both, members=order < len(both) // 2)


def full(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, list[float]]:
    """Every figure with all its trials, one a seed: what is claimed of the slow attacks.

    12 batches of each kind of image attack and 5 clients of each attack on membership, a seed.
    """
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(float(value))

    for seed in seeds:
        add("matching, batch 1: least dB", matching(seed, 12, 1).min())
        add("matching, batch 8: share above 20 dB", (matching(seed, 12, 8) > 20).mean())
        add("matching, batch 8, 5 epochs replayed: mean dB", matching(seed, 12, 8, 5).mean())
        add("DLG, sigmoid: least dB", deep_leakage(seed, 12, 1, "sigmoid").min())
        add("iDLG, sigmoid: least dB", deep_leakage(seed, 12, 1, "sigmoid", IDLG).min())
        add("DLG, ReLU: mean dB", deep_leakage(seed, 12, 1, "relu").mean())
        add("imprint, 256 bins, batch 64: share above 30 dB", (imprint(seed, 12) > 30).mean())
        for name, scores in members(images(), MLP, OVERFIT, MEMBERSHIP, seed, 5).items():
            add(f"membership, {name}: AUC", mean(scores))
            add(f"membership, {name}: TPR at 1 % FPR", mean(scores, "tpr_at_1_fpr"))
        covered = coverage(seed, 5)
        add("membership, coverage: AUC", mean(covered))
        add("membership, coverage: TPR at 1 % FPR", mean(covered, "tpr_at_1_fpr"))
    return rows
