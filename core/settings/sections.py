"""The sections of an experiment's settings, each setting with its unit and range; parts declare their own settings.

Values are validated here, once; the code that uses them does not check them again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedveil.core.declaration import Needs as Shown
from fedveil.core.settings.choice import (
    DatasetChoice,
    DefenceChoice,
    Model,
    PartitionChoice,
    ProtectionChoice,
    StrategyChoice,
)
from fedveil.core.settings.marks import Needs, UsedBy
from fedveil.core.settings.section import Count, Fraction, NonNegative, PathName, Positive, Range, Section, Width, Word


def _separator(given: str) -> str:
    if given != "tab" and (len(given) != 1 or given.isalnum() or given in "\r\n\"'.+-_\0"):
        raise ValueError("must be one character that no number or name has, as ';' or '|', or the word tab")
    return given


Separator = Annotated[str, Field(max_length=3), AfterValidator(_separator)]


class Data(Section):
    """`[data]`: the data set, the population, and the partition of the data among the clients."""

    dataset: DatasetChoice = Field(
        default_factory=DatasetChoice, description="a data set's name, see `fedveil list datasets`"
    )
    clients: Annotated[Count, Field(le=10**8)] = Field(
        10, description="the population: how many clients hold the training data"
    )
    partition: PartitionChoice = Field(
        default_factory=PartitionChoice, description="how the data is divided, see `fedveil list partitions`"
    )
    min_examples: Count = Field(
        1,
        description="the least any client holds; a partition that gives less is refused; synthetic: nobody makes fewer",
    )
    client_examples: Count | None = Field(
        None, description="the most a client keeps of what the partition gives it; all without it"
    )
    validation_fraction: Fraction = Field(0.0, description="share of its examples each client holds out to evaluate on")
    drop_duplicates: Annotated[bool, UsedBy("dataset")] = Field(
        True, description="text: drop exact repeats before splitting off the test part"
    )
    vocabulary: Annotated[PathName, UsedBy("dataset")] = Field(
        "train", description="text: train, hashed, or a file with a word a line"
    )
    vocabulary_size: Annotated[int, Field(ge=3, le=10**7), UsedBy("dataset")] = Field(
        4000, description="text: word ids, with padding and unknown"
    )
    max_tokens: Annotated[Width, UsedBy("dataset")] = Field(
        64, description="text: longer examples are cut to this many tokens"
    )
    path: Annotated[PathName | None, UsedBy("dataset")] = Field(
        None, description="own: a CSV, .npz or Parquet file, or a folder of images"
    )
    test_path: Annotated[PathName | None, UsedBy("dataset")] = Field(
        None, description="own: test data; without it a part of `path` is split off"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1), UsedBy("dataset")] = Field(
        0.2, description="share split off for testing, where a data set has no test part of its own"
    )
    group_column: Annotated[Word | None, UsedBy("dataset")] = Field(
        None, description="own: the column that names each example's source"
    )
    scale: Annotated[Literal["auto", "none", "standard", "minmax"], UsedBy("dataset")] = Field(
        "auto",
        description="own: of features; auto: standard where a column is beyond -10 to 10, or within -0.01 to 0.01",
    )
    ranges: Annotated[
        tuple[Range, ...] | None,
        Field(strict=False, max_length=10**6),
        UsedBy("dataset"),
        Needs("scale", ("auto", "minmax")),
    ] = Field(
        None, description="own: lowest and highest value, of all columns or of each, for minmax without a look at data"
    )
    labels: Annotated[tuple[Word, ...] | None, Field(strict=False, max_length=10**5), UsedBy("dataset")] = Field(
        None, description="own: the classes, in order; the second of two is the positive one"
    )
    label_column: Annotated[Word | None, UsedBy("dataset")] = Field(
        None, description="own: the column of labels; without it `label`, and in .npz the array `labels`"
    )
    merge_labels: Annotated[bool, UsedBy("dataset")] = Field(
        False, description="own: take spellings of a class for one (case, spaces, `1` and `1.0`); else they are refused"
    )
    separator: Annotated[Separator | None, UsedBy("dataset")] = Field(
        None, description="own: between the values of a CSV file, one character or `tab`; the header shows it without"
    )
    encoding: Annotated[Word | None, UsedBy("dataset")] = Field(
        None, description="own: of a CSV file, as in cp1252; without it UTF-8, or what the file's first bytes say"
    )


class Training(Section):
    """`[training]`: the local training of one client in one round."""

    epochs: Annotated[Count, Needs("steps", (None,))] = Field(1, description="passes over the client's examples")
    steps: Count | None = Field(None, description="local steps instead of epochs")
    batch_size: Count | Literal["full"] = Field(16, description="examples a step; full: all the client has")
    learning_rate: Positive = Field(0.1, description="of the local optimiser, before the schedule")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="fresh in every round")
    momentum: Fraction = Field(0.0, description="sgd: of the local optimiser")
    nesterov: bool = Field(False, description="sgd: Nesterov's momentum")
    weight_decay: NonNegative = Field(0.0, description="L2 (sgd, adam) or decoupled (adamw)")
    loss: Literal["cross_entropy", "squared_error"] = Field(
        "cross_entropy", description="squared_error: of probabilities"
    )
    schedule: Literal["constant", "step", "exponential", "cosine", "cyclic", "plateau"] = Field(
        "constant", description="of the learning rate, over rounds"
    )
    schedule_rounds: Annotated[Count, Needs("schedule", ("step", "cyclic", "plateau"))] = Field(
        10,
        description="step: rounds between falls; cyclic: rounds up and down; plateau: rounds without a better training loss",
    )
    schedule_factor: Annotated[float, Field(gt=0, lt=1), Needs("schedule", ("step", "exponential", "plateau"))] = Field(
        0.5, description="step, exponential, plateau: the rate is multiplied by this"
    )
    schedule_minimum: Annotated[NonNegative, Needs("schedule", ("cosine", "cyclic", "plateau"))] = Field(
        0.0, description="cosine, plateau: lowest rate; cyclic: the rate it starts from"
    )
    max_grad_norm: Positive | None = Field(
        None, description="clip each batch's gradient to this L2 norm (not differential privacy)"
    )
    proximal_mu: NonNegative = Field(0.0, description="FedProx: mu of the term mu/2 |w - w_global|^2")
    shift: Annotated[int, Field(ge=0, le=10**6)] = Field(0, description="images: move each by up to this many pixels")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="images: turn each by up to this many degrees"
    )
    noise: NonNegative = Field(
        0.0, description="images: add Gaussian noise of this standard deviation (augmentation, not privacy)"
    )


class Federation(Section):
    """`[federation]`: rounds, cohorts, and how the server aggregates updates."""

    rounds: Count = Field(10, description="of training and aggregation")
    cohort: Count = Field(10, description="clients that train in a round")
    sampling: Literal["fixed", "poisson", "order"] = Field(
        "fixed",
        description="of a cohort; fixed: any so many; poisson: each client by a coin of its own, so many on average; order: "
        "one after another, so that each takes part equally often",
    )
    strategy: StrategyChoice = Field(
        default_factory=StrategyChoice, description="how updates become the next model, see `fedveil list strategies`"
    )
    byzantine_clients: Annotated[int, Field(ge=0, le=10**8), UsedBy("strategy")] = Field(
        0, description="f: how many clients of a cohort may lie"
    )
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="stop when this is reached")
    patience: Count | None = Field(None, description="stop after this many evaluations without a better accuracy")
    deadline: Positive = Field(3600.0, description="seconds that a round waits for its clients")
    quorum: Count | None = Field(
        None,
        description="fewest clients whose updates make a round, else the run stops with what it kept, and with noise leaves "
        "the round out; one without it, and all of the cohort to begin",
    )
    capture: bool = Field(
        False,
        description="keep what the server sees of every round in the record (captures/), for `fedveil attack --against`",
    )


Noise = Needs("noisy", (True,), to_say="noise: privacy.epsilon, or privacy.noise_multiplier")


class Privacy(Section):
    """`[privacy]`: how updates are protected."""

    protection: ProtectionChoice = Field(default_factory=ProtectionChoice, description="see `fedveil list protections`")
    clip: Positive | Literal["adaptive"] | None = Field(
        None,
        description="the largest L2 norm of a client's update, weights after less before; with unit example, of an example's "
        "gradient; adaptive: found from round to round, a noisy median of the updates' norms; no guarantee by itself",
    )
    unit: Annotated[Literal["client", "example"], Noise] = Field(
        "client", description="whose data the noise hides: a client's whole data, or one example of it"
    )
    epsilon: Annotated[float, Field(ge=0.01, le=1000)] | None = Field(
        None,
        description="a budget: noise is calibrated to it, and the run stops before passing it; noise_multiplier without",
    )
    noise_multiplier: NonNegative = Field(
        0.0, description="standard deviation of the noise added to each number of an update, in units of privacy.clip"
    )
    noise_at: Annotated[Literal["client", "server", "distributed"], Noise] = Field(
        "client",
        description="who adds noise: each client all of it to its own update; the server once to their sum; or each client a "
        "share, so that their sum has what a server would add",
    )
    noise: Annotated[Literal["independent", "banded"], Noise] = Field(
        "independent",
        description="of the server: new in each round, or banded, which takes back a part of earlier rounds'",
    )
    distribution: Annotated[Literal["gaussian", "skellam"], Needs("noise_at", ("distributed",))] = Field(
        "gaussian", description="of distributed noise, in whole numbers: discrete Gaussian, or Skellam"
    )
    delta: Annotated[float, Field(gt=0, lt=1), Noise] = Field(
        1e-5, description="noise: the chance, about, that epsilon does not hold; smaller than 1 / data.clients"
    )
    calibrated: Annotated[Positive | None, Needs("epsilon", above=0.0, to_say="privacy.epsilon")] = Field(
        None, description="written by a run into its record: the noise multiplier that privacy.epsilon asks for"
    )
    defence: DefenceChoice = Field(
        default_factory=DefenceChoice,
        description="what a client does to its own update, no guarantee: none, prune, or your package.module:function",
    )
    leak_guard: Literal["off", "warn", "refuse"] = Field(
        "off", description="what a client does about an update in the clear that reveals its examples to simple attacks"
    )

    @property
    def shows(self) -> Shown:
        """The most that the server sees of the updates: each, the cohort's mean in the clear, or an encrypted sum."""
        return self.protection.declaration.needs

    @property
    def protected(self) -> bool:
        """Whether the server sees less than each update."""
        return self.shows != "each"

    @property
    def least(self) -> int:
        """The fewest clients whose updates are aggregated; 1 without a protection."""
        return int(self.protection.min_clients) if self.protected else 1

    @property
    def noisy(self) -> bool:
        """Whether noise is added; then all clients have the same weight, and only updates report on their data."""
        return self.noise_multiplier > 0 or self.epsilon is not None

    @property
    def multiplier(self) -> float:
        """The noise multiplier z, as given or as calibrated; 0 without noise, and where it is not calibrated yet."""
        return self.noise_multiplier if self.epsilon is None else self.calibrated or 0.0

    @property
    def bound(self) -> float | None:
        """C, the bound of a client's update; None where none is set, where it changes, and where it is an example's."""
        return self.clip if isinstance(self.clip, float) and not self.per_example else None

    @property
    def per_example(self) -> bool:
        """Whether noise hides single examples, whose gradients are clipped."""
        return self.noisy and self.unit == "example"

    @property
    def defends(self) -> bool:
        """Whether clients change their updates before these are encoded or protected."""
        return self.defence.name != "none" or (self.clip is not None and not self.per_example)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in each number of an update, sigma = z C; 0 without noise, or without one C."""
        return self.multiplier * (self.bound or 0.0)


class Communication(Section):
    """`[communication]`: the encoding of weights on the wire."""

    encoding: Literal["float32", "float16", "int8"] = Field(
        "float32",
        description="of the weights that clients send: 4 bytes each, 2, or 1; int8 sends what rounding lost with the next",
    )


class Evaluation(Section):
    """`[evaluation]`: when, on which data and by which metrics the global model is evaluated."""

    every: Count = Field(1, description="rounds between evaluations; the last round always is evaluated")
    federated: bool = Field(False, description="clients evaluate on the part they hold out (data.validation_fraction)")
    cohort: Count | None = Field(None, description="clients that evaluate; federation.cohort without it")
    metrics: Annotated[tuple[Word, ...], Field(strict=False, max_length=100)] | None = Field(
        None, description="metrics of your own, each a package.module:function, beside those of `fedveil list metrics`"
    )


class Settings(Section):
    """All settings of an experiment."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")] = Field("experiment", description="of the record's folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of every random choice")
    engine: Literal["auto", "batched", "sequential", "processes", "ray"] = Field(
        "auto",
        description="how clients are computed: all at once, one by one, one by one in several processes, or on Flower's "
        "simulation runtime; auto picks and says why",
    )
    workers: Annotated[Count, Field(le=10**5)] | None = Field(
        None, description="processes that compute, all cores without it; changes the time and nothing else"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is the CPU")
    data: Data = Field(default_factory=Data)
    model: Model = Field(
        default_factory=Model,
        description="a network's name, see `fedveil list models`, or your package.module:factory",
    )
    training: Training = Field(default_factory=Training)
    federation: Federation = Field(default_factory=Federation)
    privacy: Privacy = Field(default_factory=Privacy)
    communication: Communication = Field(default_factory=Communication)
    evaluation: Evaluation = Field(default_factory=Evaluation)
