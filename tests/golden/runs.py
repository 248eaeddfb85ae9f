"""The runs whose bytes must be those of the reference, as data: `compare.py` runs each with the old code and with the new.

Settings are spelled as 0.1.0 spells them: later versions read its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from golden.inputs import DEFENCE, DEPLOYED, FLAT_KEYS, FLOWER, NETWORK, STRATEGY, features, messages

Way = Literal["here", "command", "killed", "flower", "deployed", "attack"]


@dataclass(frozen=True)
class Run:
    """One experiment, and how it is run.

    preset: the name of the one it starts from; text: a settings file in its place
    settings: changes to it, by dotted key
    files: what its folder holds before it starts, by name
    data: the folder of FEDVEIL_DATA it reads; empty where it needs none
    way: `here` in one process by `fedveil.run`; `command` by `fedveil run`; `killed` by SIGKILL in mid-run, and resumed;
        `flower` by `flwr run` on a SuperLink; `deployed` by a server and three clients on loopback; `attack` by
        `fedveil attack`, whose scores stand for the run's bytes
    attack: the attack's name; captured: on what was captured of a run, not on clients made for it
    quick: among the few that `make test` runs
    """

    name: str
    covers: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "digits"
    text: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    way: Way = "here"
    attack: str = ""
    captured: bool = False
    quick: bool = False


SMALL: dict[str, Any] = {"model.hidden": [16], "training.epochs": 1, "federation.rounds": 3}
DIRICHLET: dict[str, Any] = {**SMALL, "data.partition": "dirichlet", "data.partition_alpha": 0.5}
LSTM: dict[str, Any] = {"data.clients": 4, "federation.cohort": 3, "federation.rounds": 2, "model.units": 8}
LSTM |= {"model.embedding": 4}
PROTECTED: dict[str, Any] = {**DIRICHLET, "federation.cohort": 5}
HELD_OUT: dict[str, Any] = {"data.validation_fraction": 0.2, "evaluation.federated": True}
# every kind of state that later rounds take from earlier ones
STATEFUL: dict[str, Any] = {
    **HELD_OUT,
    "data.clients": 6,
    "model.hidden": [16],
    "training.epochs": 1,
    "training.schedule": "plateau",
    "training.schedule_rounds": 1,
    "federation.cohort": 3,
    "federation.rounds": 60,
    "federation.strategy": "fedadam",
    "federation.server_learning_rate": 3.0,  # too large: the loss rises, and the schedule answers
}


def _presets() -> Iterator[Run]:
    few = {
        "digits": ({}, ""),
        "spam-demo": ({"federation.rounds": 4}, ""),
        "million": ({"federation.rounds": 2}, ""),
        "mnist-mlp": ({"federation.rounds": 3}, "mnist"),
        "mnist-2nn": ({"federation.rounds": 5}, "mnist"),
        "mnist-shards": ({"federation.rounds": 5}, "mnist"),
        "sms-mlp": ({"federation.rounds": 3}, "sms"),
        "sms-lstm": ({"federation.rounds": 2}, "sms"),
        "enron-book": ({"federation.rounds": 2, "training.epochs": 1}, "enron"),
    }
    for name, (settings, data) in few.items():
        yield Run(f"preset-{name}", f"the preset {name}", settings, preset=name, data=data, quick=name == "digits")


def _strategies() -> Iterator[Run]:
    own: dict[str, dict[str, Any]] = {
        "fedavg": {},
        "fedprox": {"training.proximal_mu": 0.1},
        "fedavgm": {"federation.server_momentum": 0.7},
        "fedadam": {"federation.server_learning_rate": 0.05, "federation.beta_1": 0.8},
        "fedyogi": {"federation.tau": 0.01},
        "fedadagrad": {"federation.server_learning_rate": 0.05},
        "qfedavg": {"federation.q": 0.5},
        "fedmedian": {},
        "fedtrimmedavg": {"federation.trim_fraction": 0.25},
        "krum": {"federation.malicious": 1},
        "multikrum": {"federation.malicious": 1, "federation.selected": 3},
        "bulyan": {"federation.malicious": 1},
    }
    for name, settings in own.items():
        chosen = {**DIRICHLET, "federation.cohort": 8, "federation.strategy": name, **settings}
        yield Run(f"strategy-{name}", f"federation.strategy {name}", chosen, quick=name in ("fedadam", "bulyan"))
    chosen = {**DIRICHLET, "federation.strategy": "own_strategy:slow"}
    yield Run("strategy-own", "a user's own Flower strategy", chosen, files={"own_strategy.py": STRATEGY})


def _data() -> Iterator[Run]:
    own: dict[str, dict[str, Any]] = {
        "iid": {},
        "shards": {"data.partition_shards": 3},
        "dirichlet": {"data.partition_alpha": 0.2},
        "quantity": {"data.partition_exponent": 1.5},
        "classes": {"data.partition_classes": 3},
    }
    for name, settings in own.items():
        chosen = {**SMALL, "data.partition": name, **settings}
        yield Run(f"partition-{name}", f"data.partition {name}", chosen)
    natural = {**SMALL, "data.partition": "natural", "data.clients": 200, "federation.cohort": 20}
    natural |= {"data.synthetic_beta": 0.5, "data.examples_spread": 0.7, "data.synthetic_rule": "shared"}
    yield Run("partition-natural", "data.partition natural", natural, preset="million")
    limits = {**SMALL, "data.client_examples": 60, "data.test_fraction": 0.3, "data.min_examples": 5}
    yield Run("partition-limits", "data.client_examples, min_examples, test_fraction", limits)

    text = {"data.dataset": "own", "data.path": "mail.csv", "data.clients": 5, "federation.cohort": 4}
    text |= {"federation.rounds": 3}
    mail = {"mail.csv": messages(300)}
    grouped = {**text, "data.partition": "natural", "data.group_column": "mailbox", "data.labels": ["ham", "spam"]}
    yield Run("own-text", "a CSV of texts, grouped by a column", grouped, preset="sms-mlp", files=mail, quick=True)
    listed = {**text, "data.vocabulary": "words.txt", "data.vocabulary_size": 12, "data.drop_duplicates": False}
    words = {"mail.csv": mail["mail.csv"].replace(",mailbox\n", "\n", 1), "words.txt": "prize\nlunch\nfree\ncash\n"}
    words["mail.csv"] = "\n".join(line.rpartition(",box")[0] or line for line in words["mail.csv"].splitlines()) + "\n"
    yield Run("own-vocabulary", "a CSV of texts, a vocabulary from a file", listed, preset="sms-mlp", files=words)
    hashed = {**LSTM, "data.vocabulary": "hashed", "data.vocabulary_size": 500, "data.max_tokens": 8}
    yield Run("vocabulary-hashed", "data.vocabulary hashed", hashed, preset="spam-demo")
    numbers = {**SMALL, "data.dataset": "own", "data.path": "solids.csv"}
    yield Run("own-features", "a CSV of numbers", numbers, files={"solids.csv": features(400)})
    tested = {**numbers, "data.test_path": "test.csv"}
    files = {"solids.csv": features(400), "test.csv": features(90)}
    yield Run("own-tested", "a CSV of numbers, tested on another", tested, files=files)
    yield Run("flat-keys", "a settings file with many flat keys", text=FLAT_KEYS, quick=True)
    yield Run("seed", "another seed", {**SMALL, "seed": 7})


def _models() -> Iterator[Run]:
    for name in ("leaky_relu", "prelu", "elu", "sigmoid", "tanh"):  # relu is everywhere else
        chosen = {**SMALL, "model.hidden": [16, 12], "model.activation": name}
        yield Run(f"activation-{name}", f"model.activation {name}", chosen)
    layered = {**SMALL, "model.hidden": [16, 12], "model.normalization": "layer", "model.dropout": 0.3}
    for engine in ("batched", "sequential"):
        chosen = {**layered, "engine": engine}
        yield Run(f"dropout-{engine}", f"model.normalization and dropout, {engine}", chosen, quick=engine == "batched")
    for name in ("xavier", "lecun", "zeros"):
        chosen = {**SMALL, "model.initialization": name}
        yield Run(f"initialization-{name}", f"model.initialization {name}", chosen)
    for pooling in ("mean", "last"):
        chosen = {**LSTM, "model.pooling": pooling, "model.layers": 2, "model.dropout": 0.2}
        yield Run(f"lstm-{pooling}", f"a deep LSTM with dropout, model.pooling {pooling}", chosen, preset="spam-demo")
    for name in ("mlp", "bag"):
        chosen = {"model.name": name, "model.embedding": 8, "federation.rounds": 3}
        yield Run(f"text-{name}", f"model.name {name} on text", chosen, preset="spam-demo")
    summed = {"model.name": "bag", "model.pooling": "sum", "model.embedding": 4, "federation.rounds": 3}
    yield Run("text-bag-sum", "the sum of words", {**summed, "training.learning_rate": 0.001}, preset="spam-demo")
    batched = {**LSTM, "engine": "batched"}
    yield Run("lstm-batched", "an LSTM, all clients at once", batched, preset="spam-demo")
    for name in ("gated", "convolution"):
        for engine in ("batched", "sequential"):
            chosen = {**DIRICHLET, "model.name": f"own_network:{name}", "engine": engine}
            del chosen["model.hidden"]
            yield Run(
                f"own-{name}-{engine}",
                f"an own network, {name}, {engine}",
                chosen,
                files={"own_network.py": NETWORK},
                quick=(name, engine) == ("gated", "batched"),
            )


def _training() -> Iterator[Run]:
    own: dict[str, dict[str, Any]] = {
        "sgd": {},
        "momentum": {"training.momentum": 0.9, "training.learning_rate": 0.05},
        "nesterov": {"training.momentum": 0.8, "training.nesterov": True, "training.learning_rate": 0.05},
        "weight-decay": {"training.weight_decay": 0.01, "training.momentum": 0.5},
        "adam": {"training.optimizer": "adam", "training.learning_rate": 0.01, "training.weight_decay": 0.001},
        "adamw": {"training.optimizer": "adamw", "training.learning_rate": 0.01, "training.weight_decay": 0.1},
    }
    for name, settings in own.items():
        for engine in ("batched", "sequential"):
            chosen = {**DIRICHLET, "engine": engine, **settings}
            yield Run(f"optimizer-{name}-{engine}", f"optimizer {name}, {engine}", chosen)
    schedules: dict[str, dict[str, Any]] = {
        "constant": {},
        "step": {"training.schedule_rounds": 2, "training.schedule_factor": 0.3},
        "exponential": {"training.schedule_factor": 0.8},
        "cosine": {"training.schedule_minimum": 0.01},
        "cyclic": {"training.schedule_rounds": 2, "training.schedule_minimum": 0.02},
        "plateau": {"training.schedule_rounds": 1, "training.learning_rate": 2.0, "training.schedule_minimum": 0.1},
    }
    for name, settings in schedules.items():
        chosen = {**SMALL, "federation.rounds": 6, "training.schedule": name, **settings}
        yield Run(f"schedule-{name}", f"training.schedule {name}", chosen)
    others: dict[str, dict[str, Any]] = {
        "squared-error": {"training.loss": "squared_error"},
        "gradient-norm": {"training.max_grad_norm": 0.5},
        "proximal": {"training.proximal_mu": 0.5},
        "steps": {"training.epochs": None, "training.steps": 9},
        "full-batch": {"training.batch_size": "full"},
        "augmentation": {"training.shift": 1, "training.rotation": 15.0, "training.noise": 0.1},
    }
    for name, settings in others.items():
        for engine in ("batched", "sequential"):
            yield Run(f"{name}-{engine}", f"{name}, {engine}", {**DIRICHLET, **settings, "engine": engine})
    binary = {"training.loss": "squared_error", "federation.rounds": 2, **LSTM}
    yield Run("squared-error-binary", "squared error of one probability", binary, preset="spam-demo")


def _rounds() -> Iterator[Run]:
    held_out = {**DIRICHLET, **HELD_OUT, "data.min_examples": 5}
    yield Run("federated-evaluation", "clients evaluate", {**held_out, "evaluation.cohort": 7}, quick=True)
    binary = {**LSTM, **HELD_OUT}
    yield Run("federated-binary", "clients evaluate two classes", binary, preset="spam-demo")
    every = {**held_out, "federation.rounds": 5, "evaluation.every": 2}
    yield Run("evaluation-every", "evaluation.every", every)
    yield Run("target", "federation.target_accuracy", {"federation.target_accuracy": 0.9})
    worse = {**SMALL, "federation.rounds": 12, "training.learning_rate": 2.0, "federation.patience": 2}
    yield Run("patience", "federation.patience", worse)
    whole = {**STATEFUL, "federation.rounds": 6}
    yield Run("state", "strategy, schedule and evaluation that keep state", whole)


def _privacy() -> Iterator[Run]:
    for protection in ("ckks", "bfv", "secagg"):
        for engine in ("batched", "sequential", "processes"):
            chosen = {**PROTECTED, "privacy.protection": protection, "engine": engine}
            quick = engine == "batched"
            yield Run(f"{protection}-{engine}", f"{protection}, clients {engine}", chosen, quick=quick)
        evaluated = {**PROTECTED, **HELD_OUT, "privacy.protection": protection, "data.min_examples": 5}
        yield Run(f"{protection}-evaluation", f"{protection}, clients evaluate", evaluated)
        clipped = {**PROTECTED, "privacy.protection": protection, "privacy.range": 0.2}
        yield Run(f"{protection}-range", f"{protection}, weights beyond privacy.range", clipped)
        noisy = {**PROTECTED, "privacy.protection": protection, "privacy.clip": 1.0, "privacy.noise_multiplier": 0.3}
        yield Run(f"{protection}-noise", f"{protection}, noise of each client", noisy)
        text = {**LSTM, "privacy.protection": protection}
        yield Run(f"{protection}-lstm", f"{protection}, an LSTM", text, preset="spam-demo")
    conservative = {**PROTECTED, "privacy.protection": "ckks", "privacy.profile": "conservative"}
    yield Run("ckks-conservative", "ckks, privacy.profile conservative", conservative)
    own = {
        **PROTECTED,
        "privacy.protection": "bfv",
        "privacy.profile": "own",
        "privacy.degree": 8192,
        "privacy.primes": [60, 60],
    }
    yield Run("bfv-own", "bfv, a profile of one's own", {**own, "privacy.plain_bits": 44})
    masked = {**PROTECTED, "privacy.protection": "secagg"}
    for strategy in ("fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        chosen = {**masked, "federation.strategy": strategy}
        chosen |= {"training.proximal_mu": 0.1} if strategy == "fedprox" else {}
        yield Run(f"secagg-{strategy}", f"secagg under {strategy}", chosen)
    dropped = {**masked, "privacy.drop_outs": 0.4, "privacy.colluders": 0.0}
    yield Run("secagg-drop-outs", "secagg, privacy.drop_outs and colluders", dropped)
    server = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.3, "privacy.noise_at": "server"}
    yield Run("secagg-server-noise", "secagg, noise of the server", {**masked, **server})

    yield Run("clip", "privacy.clip", {**DIRICHLET, "privacy.clip": 0.5})
    noisy = {**DIRICHLET, "privacy.clip": 1.0, "privacy.noise_multiplier": 0.2}
    for engine in ("batched", "sequential"):
        chosen = {**noisy, "engine": engine}
        yield Run(f"client-noise-{engine}", f"noise of each client, {engine}", chosen, quick=engine == "batched")
    yield Run("server-noise", "noise of the server", {**noisy, "privacy.noise_at": "server", "privacy.delta": 1e-4})
    yield Run("server-noise-fedadam", "noise of the server, fedadam", {
        **noisy, "privacy.noise_at": "server", "federation.strategy": "fedadam"
    })  # fmt: skip
    budget = {**DIRICHLET, "privacy.epsilon": 8.0, "privacy.clip": 1.0, "privacy.noise_at": "server"}
    one_step = {"privacy.unit": "example", "training.epochs": None, "training.steps": 1, "privacy.delta": 1e-4}
    private: dict[str, dict[str, Any]] = {
        "poisson-adaptive": {"federation.sampling": "poisson", "privacy.clip": "adaptive"},
        "order-banded": {"federation.sampling": "order", "privacy.noise": "banded", "federation.cohort": 4},
        "shares-secagg": {"privacy.noise_at": "distributed", "privacy.protection": "secagg"},
        "shares-bfv": {"privacy.noise_at": "distributed", "privacy.protection": "bfv"},
        "examples": {"privacy.unit": "example", "privacy.noise_at": "client", "privacy.delta": 1e-4},
        "examples-in-sums": one_step,
    }
    for name, settings in private.items():
        yield Run(f"private-{name}", f"a budget of privacy: {name}", {**budget, **settings}, quick=name == "examples")
    for engine in ("batched", "sequential"):
        pruned = {**DIRICHLET, "privacy.defence": "prune", "privacy.prune_fraction": 0.7, "engine": engine}
        yield Run(f"prune-{engine}", f"pruned updates, {engine}", pruned)
    both = {**PROTECTED, "privacy.protection": "bfv", "privacy.defence": "prune", "privacy.clip": 0.4}
    yield Run("prune-clip-bfv", "pruned and clipped updates, encrypted", both)
    halved = {**DIRICHLET, "privacy.defence": "own_defence:halve"}
    yield Run("defence-own", "a user's own defence", halved, files={"own_defence.py": DEFENCE})
    yield Run("leak-guard", "privacy.leak_guard warn", {**SMALL, "privacy.leak_guard": "warn"})


def _encodings() -> Iterator[Run]:
    for encoding in ("float16", "int8"):
        for engine in ("batched", "sequential", "processes"):
            chosen = {**DIRICHLET, "federation.rounds": 4, "communication.encoding": encoding, "engine": engine}
            yield Run(f"{encoding}-{engine}", f"communication.encoding {encoding}, {engine}", chosen)
    text = {**LSTM, "federation.rounds": 4, "communication.encoding": "int8"}
    yield Run("int8-lstm", "int8 of an LSTM", text, preset="spam-demo")


def _engines() -> Iterator[Run]:
    for engine in ("batched", "processes"):
        for workers in (1, 2):
            chosen = {**DIRICHLET, "engine": engine, "workers": workers}
            quick = (engine, workers) == ("processes", 2)
            yield Run(f"{engine}-{workers}", f"{engine}, workers {workers}", chosen, quick=quick)
    yield Run("sequential", "one client after another", {**DIRICHLET, "engine": "sequential"})
    for workers in (1, 2):
        chosen = {**LSTM, "engine": "processes", "workers": workers}
        yield Run(f"lstm-processes-{workers}", f"an LSTM in {workers} processes", chosen, preset="spam-demo")
    crowd = {**SMALL, "data.clients": 5000, "federation.cohort": 300, "workers": 2}
    yield Run("crowd", "a cohort of several chunks", crowd, preset="million")
    yield Run("command", "the command line", DIRICHLET, way="command")
    ray = {**LSTM, "engine": "ray", "workers": 2}
    yield Run("ray", "Flower's simulation runtime", ray, preset="spam-demo", way="command")
    # secagg is not here: under load, a client of Ray is sometimes counted as started anew, and left out
    encrypted = {**PROTECTED, "federation.rounds": 2, "engine": "ray", "workers": 2, "privacy.protection": "bfv"}
    yield Run("ray-bfv", "Flower's simulation runtime, encrypted", encrypted, way="command")


def _processes() -> Iterator[Run]:
    for engine in ("batched", "sequential", "processes"):
        chosen = {**STATEFUL, "engine": engine}
        yield Run(f"killed-{engine}", f"killed and resumed, {engine}", chosen, way="killed")
    rounded = {**STATEFUL, "communication.encoding": "int8", "engine": "batched"}
    yield Run("killed-int8", "killed and resumed, with residuals", rounded, way="killed")
    for protection in ("bfv", "secagg"):
        chosen = {**PROTECTED, "federation.rounds": 25, "privacy.protection": protection}
        yield Run(f"killed-{protection}", f"killed and resumed, {protection}", chosen, way="killed")
    noisy = {**DIRICHLET, "federation.rounds": 60, "privacy.clip": 1.0, "privacy.noise_multiplier": 0.2}
    yield Run("killed-noise", "killed and resumed, with noise", noisy, way="killed")
    yield Run("flower", "flwr run on a SuperLink", text=FLOWER, way="flower")
    encrypted = FLOWER.replace("fedavgm", "fedavg") + '[privacy]\nprotection = "bfv"\n'
    yield Run("flower-bfv", "flwr run on a SuperLink, encrypted", text=encrypted, way="flower")
    yield Run("deployed", "a server and three clients on loopback", text=DEPLOYED, way="deployed")
    for protection in ("bfv", "secagg"):
        text = DEPLOYED + f'[privacy]\nprotection = "{protection}"\n'
        yield Run(f"deployed-{protection}", f"a server and three clients, {protection}", text=text, way="deployed")


def _attacks() -> Iterator[Run]:
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "words": ("spam-demo", {}),
        "order": ("spam-demo", {"training.optimizer": "sgd", "training.learning_rate": 0.1}),
        "images": ("digits", {}),
        "spear": ("digits", {}),
        "labels": ("digits", {}),
        "counts": ("spam-demo", HELD_OUT),
        "matching": ("digits", {"model.hidden": [16]}),
        "dlg": ("digits", {"model.hidden": [16], "model.activation": "sigmoid"}),
        "idlg": ("digits", {"model.hidden": [16], "model.activation": "sigmoid"}),
        "imprint": ("digits", {}),
        "loss": ("digits", {}),
        "loss-difference": ("digits", {}),
        "cosine": ("digits", {}),
        "coverage": ("spam-demo", {}),
        "lira": ("digits", {}),
        "lira-offline": ("digits", {}),
    }
    for name, (preset, settings) in rows.items():
        yield Run(f"attack-{name}", f"the scores of attack {name}", settings, preset=preset, way="attack", attack=name)
    captured: dict[str, tuple[str, dict[str, Any]]] = {
        "words": ("spam-demo", {"federation.rounds": 2}),
        "images": ("digits", {**SMALL, "training.steps": 1, "training.epochs": None, "training.batch_size": 1}),
        "labels": ("digits", {**SMALL, "engine": "sequential"}),
    }
    for name, (preset, settings) in captured.items():
        chosen, covers = {**settings, "federation.capture": True}, f"the scores of attack {name} on a captured run"
        yield Run(f"captured-{name}", covers, chosen, preset=preset, way="attack", attack=name, captured=True)


RUNS: dict[str, Run] = {
    run.name: run
    for part in (
        _presets, _strategies, _data, _models, _training, _rounds, _privacy, _encodings, _engines, _processes, _attacks
    )
    for run in part()
}  # fmt: skip
