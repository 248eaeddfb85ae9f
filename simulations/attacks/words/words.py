"""The words of a client's texts, from the rows of the word table that its update moved (Trask 2019, chapter 15)."""

from __future__ import annotations

import numpy as np

from fedveil.core.randomness import Stream
from fedveil.models import parameters as weights
from fedveil.models.networks.words import PooledWords
from fedveil.privacy.leakage import words
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation


def read(observation: Observation, known: Known, _stream: Stream) -> dict[int, int]:
    """Count each word, where the network pools words and the update is of one text; else count each as 1."""
    assert observation.before is not None
    assert observation.update is not None
    table = words.find(observation.before, known.task.vocabulary_size)
    assert table is not None
    change = observation.update[table]
    found = words.moved(observation.before[table], change, observation.clients)
    pools = any(isinstance(module, PooledWords) for module in known.network.modules())
    often = words.counts(change[found]) if pools and observation.examples == 1 else None
    return dict(
        zip(found.tolist(), np.ones(len(found), int).tolist() if often is None else often.tolist(), strict=True)
    )


def suits(known: Known) -> str | None:
    """Return why a network's update reveals no words, or None."""
    if known.task.kind != "text":
        return f"the data are {known.task.kind}, and it reads words; take a preset of text, such as sms-lstm"
    if words.find(weights.to_numpy(weights.get(known.network)), known.task.vocabulary_size) is None:
        return (
            f"the network has no word table, a weight with a row for each of the {known.task.vocabulary_size:,} words; "
            "take model.name = 'lstm', 'mlp' or 'bag'"
        )
    return None


def warn(observation: Observation, known: Known) -> str | None:
    """Return what will spoil the words, or None.

    An aggregate mixes the words of several clients, and Adam moves a row as far for one occurrence as for many.
    """
    if observation.clients > 1:
        return f"the words of all {observation.clients} clients are read together, not whose they are"
    training = observation.training
    if training is not None and training.optimizer != "sgd":
        return f"training.optimizer = '{training.optimizer}' moves every row alike: it tells which words occur, and their counts are guessed"
    return None


WORDS = Attack(
    run=read,
    recovers="words",
    needs=("update",),
    suits=suits,
    warn=warn,
    cost="milliseconds",
    cites="Trask 2019, Grokking Deep Learning, chapter 15; Melis et al. 2019, section 4.1",
)
