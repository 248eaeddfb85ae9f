"""LiRA: membership from the likelihood of a model's confidence among shadow models that saw the example, or did not.

Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First Principles", S&P 2022, algorithm 1
(online) and section VI (offline). A shadow model is what the client would have sent with other examples: it is trained
from the same model, in the same way, on as many examples. All shadows are trained at once.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, join
from fedveil.core.randomness import Stream
from fedveil.models import parameters as weights
from fedveil.models.local.inputs import device_of, to_tensor
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import example
from fedveil.models.vectorized.batched import batched
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters
from fedveil.simulations.attacks.membership.membership import after, outputs

SHADOWS = 32


def by_likelihood(observation: Observation, known: Known, stream: Stream, *, online: bool) -> np.ndarray:
    """Return the log likelihood ratio of each candidate's confidence, shadows that saw it or others: float64 [n].

    Offline no shadow sees a candidate, and the score is how many standard deviations the confidence lies above theirs.
    Raises SettingsError where there are too few auxiliary examples to train shadows on.
    """
    candidates = known.candidates
    assert candidates is not None
    assert known.auxiliary is not None
    saw = _halves(len(candidates), stream) if online else np.zeros((SHADOWS, len(candidates)), dtype=bool)
    shadows = _train(observation, known, _datasets(observation, known, saw, stream), stream)
    confident = np.stack([confidence(known, shadow, candidates) for shadow in shadows])  # [shadows, n]
    own = confidence(known, after(observation), candidates)
    mean_out, spread_out = _normal(confident, ~saw)
    if not online:
        above: np.ndarray = (own - mean_out) / spread_out
        return above
    mean_in, spread_in = _normal(confident, saw)
    likelier: np.ndarray = _log_likelihood(own, mean_in, spread_in) - _log_likelihood(own, mean_out, spread_out)
    return likelier


def confidence(known: Known, parameters: Parameters, examples: Examples) -> np.ndarray:
    """Return log(p / (1 - p)), with p the probability of each example's class, float64 [n] (section V-A)."""
    logits = outputs(known.network, parameters, examples)
    labels = to_tensor(examples.labels, logits.device)
    if logits.shape[1] == 1:
        found = logits[:, 0] * (2 * labels - 1)
    else:
        own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
        found = logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
    values: np.ndarray = found.cpu().numpy()
    return values


def _halves(candidates: int, stream: Stream) -> np.ndarray:
    """Return which candidates each shadow sees, bool [shadows, candidates]: one half, and the next shadow the other."""
    rng = stream.generator("candidates of shadows")
    saw = np.zeros((SHADOWS, candidates), dtype=bool)
    for pair in range(0, SHADOWS, 2):
        saw[pair, rng.permutation(candidates)[: candidates // 2]] = True
        saw[pair + 1] = ~saw[pair]
    return saw


def _datasets(observation: Observation, known: Known, saw: np.ndarray, stream: Stream) -> list[Examples]:
    """Return as many examples for each shadow as the client trained on: the candidates it sees, and auxiliary ones."""
    candidates, auxiliary, n = known.candidates, known.auxiliary, observation.examples or 0
    assert candidates is not None
    assert auxiliary is not None
    pool = join([candidates, auxiliary])
    rng = stream.generator("auxiliary examples of shadows")
    chosen: list[Examples] = []
    for row in saw:
        own = np.flatnonzero(row)[:n]
        missing = n - len(own)
        if missing > len(auxiliary):
            raise SettingsError(
                f"LiRA trains its shadows on {missing:,} auxiliary examples each, and there are {len(auxiliary):,}: attack a "
                "client with fewer examples"
            )
        others = len(candidates) + rng.permutation(len(auxiliary))[:missing]
        chosen.append(pool.select(np.concatenate([own, others])))
    return chosen


def _train(observation: Observation, known: Known, clients: list[Examples], stream: Stream) -> list[Parameters]:
    """Train a shadow on each of these data sets, and return what the client would have sent with it."""
    assert observation.before is not None
    assert observation.training is not None
    device = device_of(known.network)
    how = batched(known.network, example(known.task).to(device))
    seed = stream.integer("training of shadows")
    trained = train_clients(
        known.network,
        weights.from_numpy(observation.before, device),
        clients,
        observation.training,
        observation.training.learning_rate,
        [Stream(seed, observation.round, shadow) for shadow in range(len(clients))],
        classes=len(known.task.classes),
        together=None if isinstance(how, str) else how,
    )
    stacked = weights.to_numpy(trained.parameters)
    return [{name: array[shadow] for name, array in stacked.items()} for shadow in range(len(clients))]


def _normal(confident: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, float]:
    """Return each candidate's mean over the shadows of `which` [shadows, n], float64 [n], and one standard deviation.

    A standard deviation of each candidate would rest on a dozen values (section VI-A, global variance).
    """
    count = which.sum(axis=0)
    mean = np.where(which, confident, 0).sum(axis=0) / count
    squares = np.where(which, (confident - mean) ** 2, 0).sum()
    return mean, float(np.sqrt(squares / (count - 1).sum()))


def _log_likelihood(values: np.ndarray, mean: np.ndarray, spread: float) -> np.ndarray:
    """Return the log likelihood under a normal distribution, up to a constant."""
    found: np.ndarray = -0.5 * ((values - mean) / spread) ** 2 - np.log(spread)
    return found


LIRA = Attack(
    run=partial(by_likelihood, online=True),
    recovers="members",
    needs=("update", "single client", "training", "examples", "auxiliary", "candidates"),
    cost=f"the training of {SHADOWS} clients",
    cites="Carlini et al. 2022, Membership Inference Attacks From First Principles, algorithm 1",
)

LIRA_OFFLINE = Attack(
    run=partial(by_likelihood, online=False),
    recovers="members",
    needs=("update", "single client", "training", "examples", "auxiliary", "candidates"),
    cost=f"the training of {SHADOWS} clients",
    cites="Carlini et al. 2022, Membership Inference Attacks From First Principles, section VI",
)
