"""Made-up examples for a population of any size: each client generates its own on demand, and nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples, Task, join
from fedveil.core.randomness import Stream
from fedveil.core.settings.marks import Needs
from fedveil.core.settings.section import Count, NonNegative, Section
from fedveil.core.settings.sections import Data, Settings
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.splits import evenly

FEATURES, CLASSES = 60, 10
TEST_CLIENTS, TEST_EXAMPLES = 1_000, 10_000  # at most this many clients, and at least this many examples of all
QUANTILES = 1 << 12  # number of sizes a client may have; the largest is 3.7 deviations above the median
_SCALE = np.arange(1, FEATURES + 1, dtype=np.float64) ** -0.6  # the square root of Sigma's diagonal, j^-1.2
_SIZES_SEED = Stream(0).integer("synthetic sizes")

Rule = tuple[np.ndarray, np.ndarray]  # float64 W [features, classes] and b [classes]: a label is argmax(x W + b)


class SyntheticSettings(Section):
    """Settings of `synthetic`."""

    examples: Annotated[Count, Field(le=10**7)] = Field(100, description="how many each client makes, on average")
    spread: Annotated[float, Field(ge=0, le=3)] = Field(
        1.0, description="standard deviation of the logarithm of clients' sizes; 0 makes them equal"
    )
    beta: Annotated[NonNegative, Needs("data.partition", ("natural",))] = Field(
        1.0, description="partition natural: how far apart clients' features lie; beta of Li et al. 2020"
    )
    rule: Annotated[Literal["own", "shared"], Needs("data.partition", ("natural",))] = Field(
        "own", description="partition natural: what makes features a label, each client's own or the same for all"
    )


def check(settings: SyntheticSettings, experiment: Settings) -> None:
    """Raise SettingsError where the experiment would divide or limit the examples that each client generates."""
    data = experiment.data
    if data.partition.name not in ("iid", "natural"):
        raise SettingsError(
            f"data.partition = '{data.partition}': there is nothing to divide where each client of data.dataset = 'synthetic' "
            "makes its own examples; take 'iid' (all clients alike) or 'natural' (each a source of its own)"
        )
    if data.client_examples is not None:
        raise SettingsError(
            "data.client_examples: each client of data.dataset = 'synthetic' makes its own; set data.dataset.examples"
        )
    if data.min_examples > settings.examples:
        raise SettingsError(
            f"data.min_examples = {data.min_examples}: larger than the average, data.dataset.examples = {settings.examples}"
        )


@part(
    SyntheticSettings, tasks=("classification of features",), uses=("clients", "partition", "min_examples"), check=check
)
def synthetic(data: Data) -> DataSet:
    """Load Synthetic(alpha, beta): 60 features, float32, and 10 classes, the same for every seed of the experiment.

    Client k draws features N(v_k, Sigma), Sigma diagonal with j^-1.2, and labels them argmax(softmax(x W_k + b_k)).
    `data.partition`
      natural: v_k ~ N(B_k, 1) with B_k ~ N(0, beta), beta a standard deviation as in the authors' code; W_k, b_k ~
        N(0, 1), or, with `data.dataset.rule` = 'shared', one W and b for all (as in Acar et al. 2021)
      iid: v_k = 0, and one W and b for all
    Li et al. draw W_k, b_k ~ N(u_k, 1) with u_k ~ N(0, alpha). That adds one number, u_k (1 + sum(x)), to the scores of
    all classes, which changes no label, so there is no alpha to set. Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith,
    "Federated optimization in heterogeneous networks", 2020, section 5.1.

    The test part comes from the clients' distributions, by separate streams: 10,000 examples or a few more, equally
    many from each of up to 1,000 clients, evenly spaced among all.
    """
    clients = Synthetic.of(data)
    chosen = evenly(clients.clients, TEST_CLIENTS)
    each = -(-TEST_EXAMPLES // len(chosen))
    test = join([clients.test(int(k), each) for k in chosen])
    task = Task("features", (FEATURES,), tuple(str(c) for c in range(CLASSES)))
    return DataSet("synthetic", task, clients, test, made_up=True)


@dataclass(frozen=True, eq=False)
class Synthetic:
    """A population whose clients generate their examples, each from its own stream, the same at every call.

    clients: number of clients
    beta: standard deviation of B_k; None where all v_k are 0
    shared: the rule of all clients; None where each has its own
    size_of: int64 [QUANTILES], the sizes that a client may have, ascending and equally likely
    """

    clients: int
    beta: float | None
    shared: Rule | None
    size_of: np.ndarray

    @classmethod
    def of(cls, data: Data) -> Synthetic:
        """Return the population that the settings describe."""
        settings, natural = data.dataset.settings, data.partition.name == "natural"
        own = natural and settings.rule == "own"
        return cls(
            data.clients,
            settings.beta if natural else None,
            None if own else _rule(Stream(0).generator("synthetic rule")),
            _sizes(settings.examples, settings.spread, data.min_examples),
        )

    def examples(self, client: int) -> tuple[Examples, np.ndarray]:
        """Generate the client's examples; return them and all their row numbers, int64 [n]."""
        (size,) = self.sizes(np.array([client]))
        rng = Stream(0, client=client).generator("synthetic client")
        mean, rule = self._distribution(rng)
        return _draw(int(size), mean, rule, rng), np.arange(size)

    def test(self, client: int, n: int) -> Examples:
        """Generate n test examples from a client's distribution."""
        mean, rule = self._distribution(Stream(0, client=client).generator("synthetic client"))
        return _draw(n, mean, rule, Stream(0, client=client).generator("synthetic test"))

    def sizes(self, clients: np.ndarray) -> np.ndarray:
        """Return the number of examples of each of the clients (int64 [m]), int64 [m], without generating them."""
        numbers = splitmix(_SIZES_SEED, clients)
        drawn: np.ndarray = self.size_of[numbers % np.uint64(QUANTILES)]
        return drawn

    def counts(self, clients: np.ndarray, classes: int) -> np.ndarray:
        """Generate the clients' examples, and count those of each class: int64 [m, classes]."""
        return np.array([np.bincount(self.examples(int(k))[0].labels, minlength=classes) for k in clients])

    def _distribution(self, rng: np.random.Generator) -> tuple[np.ndarray | float, Rule]:
        """Draw v_k and the client's rule, from the first numbers of its stream `rng`."""
        mean = 0.0 if self.beta is None else rng.normal(rng.normal(0, self.beta), 1, FEATURES)
        return mean, self.shared or _rule(rng)


def _rule(rng: np.random.Generator) -> Rule:
    return rng.standard_normal((FEATURES, CLASSES)), rng.standard_normal(CLASSES)


def _draw(n: int, mean: np.ndarray | float, rule: Rule, rng: np.random.Generator) -> Examples:
    features = (mean + _SCALE * rng.standard_normal((n, FEATURES))).astype(np.float32)
    weights, bias = rule
    # labels of the float32 features, computed in float64, so that they do not depend on a library's rounding
    return Examples(features, np.argmax(features.astype(np.float64) @ weights + bias, axis=1))


def _sizes(mean: int, spread: float, least: int) -> np.ndarray:
    """Return rounded quantiles, at least `least`, of a lognormal with this mean and `spread` of the logarithm."""
    quantile = NormalDist().inv_cdf
    factors = np.exp(spread * np.array([quantile((i + 0.5) / QUANTILES) for i in range(QUANTILES)]))
    sizes: np.ndarray = np.maximum(np.rint(mean * factors / factors.mean()), least).astype(np.int64)
    return sizes


def splitmix(seed: int, positions: np.ndarray) -> np.ndarray:
    """Return the numbers of the SplitMix64 generator at `positions` (int64 [m], 0 the first): uint64 [m].

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. A number at any position takes
    nanoseconds; a NumPy stream for each client would take 20 microseconds.
    """
    z = np.uint64(seed) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
