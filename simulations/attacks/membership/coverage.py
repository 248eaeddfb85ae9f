"""Membership of a text: training moves the rows of all its words, and most other texts have a word that stood still.

Melis et al. 2019, "Exploiting Unintended Feature Leakage in Collaborative Learning", section 4.1.
"""

from __future__ import annotations

import numpy as np

from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream
from fedveil.privacy.leakage import words
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation
from fedveil.simulations.attacks.words.words import suits

CROWDED = 2000  # texts, above which their words cover most other texts
STILL = 0.02  # chance that a trained word's row stands still: a small step is lost to float32's rounding


def by_coverage(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Return the log likelihood ratio, trained on or not, of how the rows of each candidate's words moved: float64 [n].

    A row that moved says most for a word in few texts; a row that did not move says much for any word. How many texts
    hold a word is taken from the auxiliary examples, or from the candidates where there are none.
    """
    assert observation.before is not None
    assert observation.update is not None
    assert known.candidates is not None
    assert observation.examples is not None
    table = words.find(observation.before, known.task.vocabulary_size)
    assert table is not None  # `suits` has checked it
    has_moved = np.zeros(len(observation.before[table]), dtype=bool)
    has_moved[words.moved(observation.before[table], observation.update[table])] = True
    moved_anyway = chance(known.auxiliary or known.candidates, len(has_moved), observation.examples)
    says = np.where(has_moved, np.log((1 - STILL) / moved_anyway), np.log(STILL / (1 - moved_anyway)))
    return np.array([says[_distinct(text)].sum() for text in known.candidates.features])


def chance(texts: Examples, vocabulary_size: int, drawn: int) -> np.ndarray:
    """Return the chance that at least one of `drawn` texts like these holds each word, float64 [vocabulary_size]."""
    holds = np.bincount(np.concatenate([_distinct(text) for text in texts.features]), minlength=vocabulary_size)
    share = (holds + 0.5) / (len(texts) + 1)  # no word is impossible
    chances: np.ndarray = -np.expm1(drawn * np.log1p(-share))
    return chances.clip(1e-6, 1 - 1e-6)


def _distinct(text: np.ndarray) -> np.ndarray:
    return np.unique(text[text != words.PADDING])


def warn(observation: Observation, _known: Known) -> str | None:
    """Return what will spoil the scores, or None: the words of very many texts cover most others' too."""
    if (observation.examples or 0) > CROWDED:
        return f"the words of {observation.examples:,} texts together cover most others' too"
    return None


COVERAGE = Attack(
    run=by_coverage,
    recovers="members",
    needs=("update", "examples", "candidates"),
    suits=suits,
    warn=warn,
    cost="milliseconds",
    cites="Melis et al. 2019, Exploiting Unintended Feature Leakage, section 4.1",
)
