"""The settings of an experiment: one frozen, validated object, written as TOML.

Everything a user can choose stands here, with its unit and its range; below this file nobody checks it again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedveil.core import parts
from fedveil.core.errors import SettingsError, nearest
from fedveil.core.settings.section import Count, Fraction, NonNegative, Positive, Section


class Data(Section):
    """`[data]`: what is learned from, and who holds which part of it."""

    dataset: str = Field("digits", description="a data set's name, see `fedveil list datasets`")
    clients: Count = Field(10, description="the population: how many clients hold the training data")
    partition: str = Field("iid", description="how the data is divided, see `fedveil list partitions`")
    partition_alpha: Positive = Field(0.5, description="dirichlet: concentration; small is skewed, large is IID")
    partition_classes: Count = Field(2, description="classes: how many each client holds")
    partition_shards: Count = Field(2, description="shards: how many each client gets")
    partition_exponent: NonNegative = Field(1.0, description="quantity: size of the client of rank r ~ r^-exponent")
    min_examples: Count = Field(
        1,
        description="the least any client holds; a partition that gives less is refused; synthetic: nobody makes fewer",
    )
    client_examples: Count | None = Field(
        None, description="the most a client keeps of what the partition gives it; all without it"
    )
    validation_fraction: Fraction = Field(0.0, description="share of its examples each client holds out to evaluate on")
    drop_duplicates: bool = Field(True, description="text: drop exact repeats before splitting off the test part")
    vocabulary: str = Field("train", description="text: train, hashed, or a file with a word a line")
    vocabulary_size: Annotated[int, Field(ge=3)] = Field(4000, description="text: word ids, with padding and unknown")
    max_tokens: Count = Field(64, description="text: longer examples are cut to this many tokens")
    path: str | None = Field(None, description="own: a CSV file, an .npz file, or a folder of images")
    test_path: str | None = Field(None, description="own: test data; without it a part of `path` is split off")
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share split off for testing, where a data set has no test part of its own"
    )
    group_column: str | None = Field(None, description="own: the column that names each example's source")
    labels: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        None, description="own: the classes, in order; the second of two is the positive one"
    )
    examples_per_client: Count = Field(100, description="synthetic: how many each client makes, on average")
    examples_spread: Annotated[float, Field(ge=0, le=3)] = Field(
        1.0, description="synthetic: standard deviation of the logarithm of clients' sizes; 0 makes them equal"
    )
    synthetic_beta: NonNegative = Field(
        1.0, description="synthetic, natural: how far apart clients' features lie; beta of Li et al. 2020"
    )
    synthetic_rule: Literal["own", "shared"] = Field(
        "own", description="synthetic, natural: what makes features a label, each client's own or the same for all"
    )


class Model(Section):
    """`[model]`: the network."""

    name: str = Field("mlp", description="a network's name, see `fedveil list models`, or your package.module:factory")
    hidden: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        (64, 64), description="mlp: units of each hidden layer"
    )
    activation: Literal["relu", "leaky_relu", "prelu", "elu", "sigmoid", "tanh"] = Field(
        "relu", description="mlp: after each hidden layer"
    )
    dropout: Fraction = Field(0.0, description="share of hidden values set to zero in training")
    normalization: Literal["none", "layer", "batch"] = Field("none", description="batch is refused: see its message")
    initialization: Literal["he", "xavier", "lecun", "zeros"] = Field(
        "he", description="of dense layers; zeros sets every weight to zero (an mlp then does not learn)"
    )
    embedding: Count = Field(32, description="text: numbers a word is turned into")
    units: Count = Field(64, description="lstm: size of the hidden state")
    layers: Count = Field(1, description="lstm: stacked layers")
    pooling: Literal["mean", "last", "sum"] = Field(
        "mean", description="text: how the words of an example become one vector"
    )


class Training(Section):
    """`[training]`: the local work of one client in one round."""

    epochs: Count = Field(1, description="passes over the client's examples")
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
    schedule_rounds: Count = Field(
        10,
        description="step: rounds between falls; cyclic: rounds up and down; plateau: rounds without a better training loss",
    )
    schedule_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="step, exponential, plateau: the rate is multiplied by this"
    )
    schedule_minimum: NonNegative = Field(
        0.0, description="cosine, plateau: lowest rate; cyclic: the rate it starts from"
    )
    max_grad_norm: Positive | None = Field(
        None, description="clip each batch's gradient to this L2 norm (not differential privacy)"
    )
    proximal_mu: NonNegative = Field(0.0, description="FedProx: mu of the term mu/2 |w - w_global|^2")
    shift: Annotated[int, Field(ge=0)] = Field(0, description="images: move each by up to this many pixels")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="images: turn each by up to this many degrees"
    )
    noise: NonNegative = Field(
        0.0, description="images: add Gaussian noise of this standard deviation (augmentation, not privacy)"
    )


class Federation(Section):
    """`[federation]`: rounds, who takes part, and how the server combines what it gets."""

    rounds: Count = Field(10, description="of training and aggregation")
    cohort: Count = Field(10, description="clients that train in a round")
    strategy: str = Field("fedavg", description="how updates become the next model, see `fedveil list strategies`")
    server_learning_rate: Positive | None = Field(None, description="fedavgm (1.0), fedadam, fedyogi, fedadagrad (0.1)")
    server_momentum: Fraction = Field(0.9, description="fedavgm")
    beta_1: Fraction = Field(0.9, description="fedadam, fedyogi")
    beta_2: Fraction = Field(0.99, description="fedadam, fedyogi")
    tau: Positive = Field(1e-3, description="fedadam, fedyogi, fedadagrad: adaptivity")
    q: NonNegative = Field(0.1, description="qfedavg: 0 weighs all alike")
    trim_fraction: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="fedtrimmedavg: share cut off at each end"
    )
    malicious: Annotated[int, Field(ge=0)] = Field(0, description="krum, multikrum, bulyan: how many clients may lie")
    selected: Count | None = Field(None, description="multikrum: updates to average; cohort - malicious - 2 without it")
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="stop when this is reached")
    patience: Count | None = Field(None, description="stop after this many evaluations without a better accuracy")
    deadline: Positive = Field(3600.0, description="seconds that a round waits for its clients")
    quorum: Count | None = Field(
        None,
        description="fewest clients whose updates make a round, else the run stops with what it kept; one without it, and "
        "all of the cohort to begin",
    )
    capture: bool = Field(
        False,
        description="keep what the server sees of every round in the record (captures/), for `fedveil attack --against`",
    )


class Privacy(Section):
    """`[privacy]`: how updates are protected on their way."""

    protection: str = Field("none", description="see `fedveil list protections`")
    profile: Literal["fast", "conservative", "exact-small", "own"] | None = Field(
        None, description="ckks: fast (the default), conservative or own; bfv: exact-small (the default) or own"
    )
    range: Annotated[float, Field(ge=0.01, le=1e6)] = Field(
        6.0,
        description="ckks, bfv, secagg: weights are clipped to this distance from zero; public, not a privacy bound",
    )
    min_clients: Annotated[int, Field(ge=3)] = Field(
        3, description="ckks, bfv, secagg: no aggregate of fewer clients is made or used"
    )
    degree: Literal[2048, 4096, 8192, 16384, 32768] = Field(4096, description="profile own: degree of the ring, N")
    primes: Annotated[
        tuple[Annotated[int, Field(ge=30, le=60)], Annotated[int, Field(ge=30, le=60)]], Field(strict=False)
    ] = Field((40, 60), description="profile own: bits of the modulus that travels, and of SEAL's special prime")
    plain_bits: Annotated[int, Field(ge=0, le=59)] = Field(
        45, description="profile own, bfv: bits of the plain modulus"
    )
    drop_outs: Fraction = Field(0.2, description="secagg: share of a cohort that may drop out in a round")
    colluders: Fraction = Field(
        0.2, description="secagg: share of the clients that may collude with the server, and learn nothing more"
    )
    clip: Positive | None = Field(
        None, description="the largest L2 norm of a client's update, weights after less before; no guarantee by itself"
    )
    noise_multiplier: NonNegative = Field(
        0.0, description="standard deviation of the noise added to each number of an update, in units of privacy.clip"
    )
    noise_at: Literal["client", "server"] = Field(
        "client", description="who adds noise: each client to its own update, or the server once to their sum"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="noise: the chance, about, that epsilon does not hold; smaller than 1 / data.clients"
    )
    defence: str = Field(
        "none",
        description="what a client does to its own update, no guarantee: none, prune, or your package.module:function",
    )
    prune_fraction: Fraction = Field(0.9, description="prune: share of the update's numbers that are set to zero")
    leak_guard: Literal["off", "warn", "refuse"] = Field(
        "off", description="what a client does about an update in the clear that reveals its examples to simple attacks"
    )

    @property
    def noisy(self) -> bool:
        """Whether noise is added; clients then weigh alike, and tell nothing of their data but by their updates."""
        return self.noise_multiplier > 0

    @property
    def defends(self) -> bool:
        """Whether clients change their updates before these are encoded or protected."""
        return self.defence != "none" or self.clip is not None

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in each number, sigma = z C; 0 where none is added."""
        return self.noise_multiplier * (self.clip or 0.0)


class Communication(Section):
    """`[communication]`: how weights are written on the wire."""

    encoding: Literal["float32", "float16", "int8"] = Field(
        "float32",
        description="of the weights that clients send: 4 bytes each, 2, or 1; int8 sends what rounding lost with the next",
    )


class Evaluation(Section):
    """`[evaluation]`: when and by whom the global model is evaluated."""

    every: Count = Field(1, description="rounds between evaluations; the last round always is evaluated")
    federated: bool = Field(False, description="clients evaluate on the part they hold out (data.validation_fraction)")
    cohort: Count | None = Field(None, description="clients that evaluate; federation.cohort without it")
    metrics: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        None, description="metrics of your own, each a package.module:function, beside those of `fedveil list metrics`"
    )


class Experiment(Section):
    """All settings of an experiment. Make one with `Experiment.preset`, `.load`, `.parse`, or keyword arguments.

    >>> Experiment.preset("digits").override({"federation.rounds": 3}).federation.rounds
    3
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")] = Field("experiment", description="of the record's folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of every random choice")
    engine: Literal["auto", "batched", "sequential", "processes", "ray"] = Field(
        "auto",
        description="how clients are computed: all at once, one by one, one by one in several processes, or on Flower's "
        "simulation runtime; auto picks and says why",
    )
    workers: Count | None = Field(
        None, description="processes that compute, all cores without it; changes the time and nothing else"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is the CPU")
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    federation: Federation = Federation()
    privacy: Privacy = Privacy()
    communication: Communication = Communication()
    evaluation: Evaluation = Evaluation()

    def __init__(self, /, **settings: Any) -> None:
        """Raise SettingsError that names every setting that cannot be used."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None
        _check_combinations(self)

    @classmethod
    def preset(cls, name: str) -> Experiment:
        """The preset called `name` (see `fedveil list presets`); raise SettingsError where there is none."""
        if name not in parts.PRESETS:
            known = ", ".join(parts.PRESETS)
            raise SettingsError(
                f"no preset is called '{name}'{nearest(name, parts.PRESETS)}\n  known: {known}; or a file FILE.toml"
            )
        text = resources.files("fedveil.simulations.presets").joinpath(f"{name}.toml").read_text("utf-8")
        return cls.parse(text, f"preset {name}", name=name)

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """The experiment in a TOML file; its name is the file's where the file gives none."""
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the settings file {path}: {_reason(error)}") from None
        return cls.parse(text, str(path), name="".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem))

    @classmethod
    def parse(cls, text: str, source: str = "settings", *, name: str = "experiment") -> Experiment:
        """The experiment in TOML text; `source` is named in errors."""
        try:
            settings = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{source} is not valid TOML: {error}") from None
        try:
            return cls(**{"name": name, **settings})
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None

    @classmethod
    def find(cls, name: str) -> Experiment:
        """The experiment a user names: a preset, a TOML file, or TOML text."""
        if "\n" in name or "=" in name:
            return cls.parse(name)
        return cls.load(name) if name.endswith(".toml") else cls.preset(name)

    def override(self, settings: Mapping[str, Any]) -> Experiment:
        """A copy with other values: `{"training.epochs": 5}`; None stands for the default.

        Raise SettingsError where a value cannot be used, or would change nothing: who asks for a partition's alpha and gets
        an IID run would report what was never measured.
        """
        tree = self.model_dump(exclude_none=True)
        for key, value in settings.items():
            *sections, last = key.split(".")
            branch: Any = tree
            for section in sections:
                branch = branch.setdefault(section, {})
                if not isinstance(branch, dict):
                    raise SettingsError(f"{key}: unknown setting; '{section}' is a value, not a section")
            if value is None:
                branch.pop(last, None)
            else:
                branch[last] = value
        experiment = Experiment(**tree)
        _check_effect(experiment, settings)
        return experiment

    def toml(self) -> str:
        """The resolved settings as TOML; `Experiment.parse` of it gives an equal experiment."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` words as `--set` takes them: VALUE is TOML, or else a plain word; nothing is the default."""
    settings: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"--set {word}: must be KEY=VALUE, as in --set training.epochs=5")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"] if value.strip() else None
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = value.strip()
    return settings


def resumable(folder: Path, option: str = "fedveil resume") -> Experiment:
    """The experiment of the run recorded in a folder; raise SettingsError, naming the option, where there is none."""
    path = folder / "experiment.toml"
    if not path.is_file():
        raise SettingsError(f"{option} {folder}: is not the folder of a run (it has no experiment.toml)")
    try:
        return Experiment.load(path)
    except SettingsError as error:
        raise SettingsError(
            f"{option} {folder}: its settings were edited, or written by another version of FedVeil, and this one cannot "
            f"read them\n  {error}"
        ) from None


def known_keys() -> dict[str, str]:
    """Every setting's dotted key and its description."""
    keys: dict[str, str] = {}
    for name, field in Experiment.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= {f"{name}.{k}": f.description or "" for k, f in field.annotation.model_fields.items()}
        else:
            keys[name] = field.description or ""
    return keys


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _explain(error: ValidationError) -> str:
    """One line for each key that cannot be used: what was given, and all that is allowed."""
    known = known_keys()
    sections = [name for name in Experiment.model_fields if name not in known]
    lines: dict[str, tuple[str, list[str]]] = {}
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = next((k for k in (".".join(path[:2]), path[0]) if k in known), ".".join(path))
        if problem["type"] == "extra_forbidden":
            lines[key] = (f"{key}: unknown setting{nearest(key, [*known, *sections])}", [])
            continue
        allowed = problem["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
        allowed = _WORDS.get(problem["type"], allowed)
        lines.setdefault(key, (f"{key} = {problem['input']!r}: must be ", []))[1].append(allowed)
    return "\n".join(start + ", or ".join(dict.fromkeys(allowed)) for start, allowed in lines.values())


# pydantic's words for what a user of settings would call otherwise
_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "1 to 80 letters, digits, '.', '_' or '-'",
    "model_type": "a section, as in [data]",
    "tuple_type": "a list, as in [64, 32]",
}


LATTICES = ("ckks", "bfv")  # the model itself is a ciphertext
PROTECTED = (*LATTICES, "secagg")

# What a setting needs another one to be, to have an effect.
_NEEDS = {
    "data.partition_alpha": ("data.partition", ("dirichlet",)),
    "data.partition_classes": ("data.partition", ("classes",)),
    "data.partition_shards": ("data.partition", ("shards",)),
    "data.partition_exponent": ("data.partition", ("quantity",)),
    "data.path": ("data.dataset", ("own",)),
    "data.test_path": ("data.dataset", ("own",)),
    "data.group_column": ("data.dataset", ("own",)),
    "data.test_fraction": ("data.dataset", ("digits", "sms", "enron", "spam-demo", "own")),
    "data.examples_per_client": ("data.dataset", ("synthetic",)),
    "data.examples_spread": ("data.dataset", ("synthetic",)),
    "data.synthetic_beta": ("data.dataset", ("synthetic",)),
    "data.synthetic_rule": ("data.dataset", ("synthetic",)),
    "training.schedule_rounds": ("training.schedule", ("step", "cyclic", "plateau")),
    "training.schedule_factor": ("training.schedule", ("step", "exponential", "plateau")),
    "training.schedule_minimum": ("training.schedule", ("cosine", "cyclic", "plateau")),
    "federation.server_momentum": ("federation.strategy", ("fedavgm",)),
    "federation.server_learning_rate": ("federation.strategy", ("fedavgm", "fedadam", "fedyogi", "fedadagrad")),
    "federation.beta_1": ("federation.strategy", ("fedadam", "fedyogi")),
    "federation.beta_2": ("federation.strategy", ("fedadam", "fedyogi")),
    "federation.tau": ("federation.strategy", ("fedadam", "fedyogi", "fedadagrad")),
    "federation.q": ("federation.strategy", ("qfedavg",)),
    "federation.trim_fraction": ("federation.strategy", ("fedtrimmedavg",)),
    "federation.malicious": ("federation.strategy", ("krum", "multikrum", "bulyan")),
    "federation.selected": ("federation.strategy", ("multikrum",)),
    "privacy.profile": ("privacy.protection", LATTICES),
    "privacy.range": ("privacy.protection", PROTECTED),
    "privacy.min_clients": ("privacy.protection", PROTECTED),
    "privacy.degree": ("privacy.profile", ("own",)),
    "privacy.primes": ("privacy.profile", ("own",)),
    "privacy.plain_bits": ("privacy.protection", ("bfv",)),
    "privacy.drop_outs": ("privacy.protection", ("secagg",)),
    "privacy.colluders": ("privacy.protection", ("secagg",)),
    "privacy.prune_fraction": ("privacy.defence", ("prune",)),
}

# What a protection can compute on: sums of ciphertexts alone, or any rule of the mean, which secure aggregation opens.
_LINEAR = ("fedavg", "fedprox")
_OF_THE_MEAN = (*_LINEAR, "fedavgm", "fedadam", "fedyogi", "fedadagrad")
_PROFILES = {"ckks": ("fast", "conservative", "own"), "bfv": ("exact-small", "own")}


def _check_effect(experiment: Experiment, settings: Mapping[str, Any]) -> None:
    """Refuse settings asked for that the others leave without effect."""
    for key, value in settings.items():
        if key not in _NEEDS or value is None:
            continue
        other, words = _NEEDS[key]
        section, name = other.split(".")
        found = getattr(getattr(experiment, section), name)
        if found not in words and ":" not in (found or ""):
            wanted = " or ".join(f"'{word}'" for word in words)
            raise SettingsError(
                f"{key} = {value!r}: has no effect with {other} = {found!r}; it needs {other} = {wanted}"
            )
    if settings.get("privacy.plain_bits") is not None and experiment.privacy.profile != "own":
        raise SettingsError(
            f"privacy.plain_bits = {settings['privacy.plain_bits']}: has no effect with privacy.profile = "
            f"{experiment.privacy.profile!r}; it needs privacy.profile = 'own'"
        )
    for key in ("privacy.noise_at", "privacy.delta"):
        if settings.get(key) is not None and not experiment.privacy.noisy:
            raise SettingsError(
                f"{key} = {settings[key]!r}: has no effect with privacy.noise_multiplier = 0; it needs noise"
            )
    for key in ("data.synthetic_beta", "data.synthetic_rule"):
        if settings.get(key) is not None and experiment.data.partition == "iid":
            raise SettingsError(
                f"{key} = {settings[key]!r}: has no effect with data.partition = 'iid', which makes all clients alike; it "
                "needs data.partition = 'natural'"
            )
    if settings.get("training.epochs") is not None and experiment.training.steps is not None:
        raise SettingsError(
            f"training.epochs = {settings['training.epochs']}: has no effect with training.steps = "
            f"{experiment.training.steps}, which takes its place; give one of them"
        )


def _check_combinations(e: Experiment) -> None:
    """Refuse what each setting allows by itself and together cannot work."""
    parts.DATASETS.check(e.data.dataset, "data.dataset")
    parts.PARTITIONS.check(e.data.partition, "data.partition")
    parts.MODELS.check(e.model.name, "model.name")
    parts.STRATEGIES.check(e.federation.strategy, "federation.strategy")
    parts.PROTECTIONS.check(e.privacy.protection, "privacy.protection")
    parts.DEFENCES.check(e.privacy.defence, "privacy.defence")
    for name in e.evaluation.metrics or ():
        parts.METRICS.check(name, "evaluation.metrics")
    training, federation = e.training, e.federation

    def refuse(when: bool, message: str) -> None:
        if when:
            raise SettingsError(message)

    refuse(
        federation.cohort > e.data.clients,
        f"federation.cohort = {federation.cohort}: larger than the population; data.clients = {e.data.clients}",
    )
    refuse(
        e.model.normalization == "batch",
        "model.normalization = 'batch': batch norm keeps running statistics of each client's own data; they are not "
        "weights, and averaging them gives a model that fits nobody. Use 'layer', which keeps none",
    )
    refuse(
        training.optimizer != "sgd" and training.momentum > 0,
        f"training.momentum = {training.momentum}: only sgd takes momentum; training.optimizer = '{training.optimizer}' has its own",
    )
    refuse(
        training.nesterov and (training.optimizer != "sgd" or training.momentum == 0),
        "training.nesterov = true: needs training.optimizer = 'sgd' and training.momentum above 0",
    )
    refuse(
        training.schedule in ("cosine", "cyclic", "plateau") and training.schedule_minimum >= training.learning_rate,
        f"training.schedule_minimum = {training.schedule_minimum}: must be smaller than "
        f"training.learning_rate = {training.learning_rate}, the highest of the schedule",
    )
    refuse(
        federation.strategy == "fedprox" and training.proximal_mu == 0,
        "federation.strategy = 'fedprox': with training.proximal_mu = 0 it is fedavg; set training.proximal_mu, 0.01 say",
    )
    liars = federation.malicious
    least = {"krum": 2 * liars + 3, "multikrum": 2 * liars + 3, "bulyan": 4 * liars + 3}.get(federation.strategy, 0)
    refuse(
        federation.cohort < least,
        f"federation.cohort = {federation.cohort}: {federation.strategy} with federation.malicious = {liars} needs at least {least}",
    )
    refuse(
        federation.strategy == "multikrum" and (federation.selected or 1) > federation.cohort - liars - 2,
        f"federation.selected = {federation.selected}: multikrum can select at most cohort - malicious - 2 = "
        f"{federation.cohort - liars - 2} updates",
    )
    refuse(
        e.evaluation.federated and e.data.validation_fraction == 0,
        "evaluation.federated = true: clients need a part to evaluate on; set data.validation_fraction, 0.1 say",
    )
    refuse(
        (e.evaluation.cohort or 1) > e.data.clients,
        f"evaluation.cohort = {e.evaluation.cohort}: larger than the population; data.clients = {e.data.clients}",
    )
    _check_protection(e, refuse)
    _check_noise(e, refuse)
    made = e.data.dataset == "synthetic"
    refuse(
        made and e.data.partition not in ("iid", "natural"),
        f"data.partition = '{e.data.partition}': there is nothing to divide where each client of data.dataset = 'synthetic' "
        "makes its own examples; take 'iid' (all clients alike) or 'natural' (each a source of its own)",
    )
    refuse(
        made and e.data.client_examples is not None,
        "data.client_examples: each client of data.dataset = 'synthetic' makes its own; set data.examples_per_client",
    )
    refuse(
        made and e.data.min_examples > e.data.examples_per_client,
        f"data.min_examples = {e.data.min_examples}: larger than the average, data.examples_per_client = "
        f"{e.data.examples_per_client}",
    )


def _check_protection(e: Experiment, refuse: Callable[[bool, str], None]) -> None:
    """Refuse what cannot work on sums of protected updates."""
    protection, strategy = e.privacy.protection, e.federation.strategy
    refuse(
        protection != "none" and e.communication.encoding != "float32",
        f"communication.encoding = '{e.communication.encoding}': cannot work with privacy.protection = '{protection}', whose "
        "updates have a form of their own; leave it at 'float32'",
    )
    refuse(
        protection != "none" and e.privacy.leak_guard != "off",
        f"privacy.leak_guard = '{e.privacy.leak_guard}': looks at updates in the clear, and privacy.protection = '{protection}' "
        "sends none",
    )
    if protection not in PROTECTED:
        return
    refuse(
        e.federation.cohort < e.privacy.min_clients,
        f"federation.cohort = {e.federation.cohort}: an aggregate of fewer than privacy.min_clients = "
        f"{e.privacy.min_clients} says too much about each of them; {protection} needs a larger cohort",
    )
    able = _LINEAR if protection in LATTICES else _OF_THE_MEAN
    why = {
        "fedmedian": "a median compares updates, and the server sees only their sum",
        "fedtrimmedavg": "a trimmed mean compares updates, and the server sees only their sum",
        "krum": "Krum compares updates, and the server sees only their sum",
        "multikrum": "Krum compares updates, and the server sees only their sum",
        "bulyan": "Bulyan compares updates, and the server sees only their sum",
        "qfedavg": "q-FedAvg weighs each update by its loss at the server, which sees only their sum",
        **dict.fromkeys(
            ("fedavgm", "fedadam", "fedyogi", "fedadagrad"),
            "it computes with the mean of the weights, which is a ciphertext here; privacy.protection = 'secagg' opens the mean",
        ),
    }
    refuse(
        strategy not in able,
        f"federation.strategy = '{strategy}': cannot work with privacy.protection = '{protection}': "
        f"{why.get(strategy, 'FedVeil cannot know that it needs no more than their sum')}\n  can: {', '.join(able)}",
    )
    profile = e.privacy.profile
    refuse(
        profile is not None and protection in _PROFILES and profile not in _PROFILES[protection],
        f"privacy.profile = '{profile}': is none of {protection}'s, which are {', '.join(_PROFILES.get(protection, ()))}",
    )
    refuse(
        protection == "ckks" and profile == "own" and e.privacy.primes[0] < 36,
        f"privacy.primes = {list(e.privacy.primes)}: the noise leaves no room for weights in a modulus of fewer than 36 bits",
    )


def _check_noise(e: Experiment, refuse: Callable[[bool, str], None]) -> None:
    """Refuse noise that could not guarantee what is accounted for it."""
    privacy, strategy = e.privacy, e.federation.strategy
    if not privacy.noisy:
        return
    asked = f"privacy.noise_multiplier = {privacy.noise_multiplier:g}"
    refuse(
        privacy.clip is None,
        f"{asked}: noise hides an update only up to its norm, which nothing bounds; set privacy.clip, 1.0 say",
    )
    refuse(
        privacy.noise_at == "server" and privacy.protection in LATTICES,
        f"privacy.noise_at = 'server': the server of privacy.protection = '{privacy.protection}' only adds up ciphertexts that it "
        "cannot read; use privacy.noise_at = 'client', whose noise adds up under encryption",
    )
    refuse(
        strategy not in _OF_THE_MEAN,
        f"federation.strategy = '{strategy}': cannot work with {asked}, which is accounted for the plain mean of updates\n"
        f"  can: {', '.join(_OF_THE_MEAN)}",
    )
    refuse(
        privacy.delta * e.data.clients >= 1,
        f"privacy.delta = {privacy.delta:g}: must be smaller than 1 / data.clients = {1 / e.data.clients:g}; a larger one would "
        "allow showing all of one client's data",
    )
    refuse(
        e.training.schedule == "plateau",
        f"training.schedule = 'plateau': follows the clients' training losses, which they do not tell with {asked}",
    )
    refuse(
        e.evaluation.federated,
        f"evaluation.federated = true: clients' scores travel without noise, and {asked} would not cover what they tell; "
        "evaluate on the server",
    )
