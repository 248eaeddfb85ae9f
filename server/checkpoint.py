"""What a run needs to go on: one file, replaced whole after every round.

The file is safetensors: the model, the best model, and the arrays a strategy keeps between rounds
(momenta, second moments), with a JSON description. Random streams need no saving: they are addressed by
round (`core/randomness.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError
from safetensors.numpy import save

from fedveil.core.errors import SettingsError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import from_arrays, to_arrays
from fedveil.core.record import Record

FILE = "checkpoint/state.safetensors"
FORMAT = 1
Parameters = dict[str, np.ndarray]


@dataclass
class State:
    """Everything a round takes from the ones before it.

    round: the last whole round; 0 before the first
    parameters: the global model, float32, by name
    train_losses: of every round so far, for the learning rate's schedule
    best_round, best_accuracy, best_parameters: the best evaluation so far
    stale: evaluations since the best one
    stopped: why the run ended before its last round, in words; empty where it did not
    data: digest of a user's own data, which may change between a run and its resumption; empty for others
    bytes_up, bytes_down: of all messages so far; seconds: of all rounds so far
    """

    parameters: Parameters
    round: int = 0
    train_losses: list[float] = field(default_factory=list)
    best_round: int = 0
    best_accuracy: float = -1.0
    best_parameters: Parameters = field(default_factory=dict)
    stale: int = 0
    stopped: str = ""
    data: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def save_state(record: Record, experiment: Experiment, state: State, strategy: Strategy) -> None:
    """Replace the record's checkpoint, and the models beside it, by this state, each atomically.

    Raise SettingsError, naming the attribute, where a strategy of a user's own keeps what cannot be stored.
    """
    arrays = {f"model/{k}": v for k, v in state.parameters.items()}
    arrays |= {f"best/{k}": v for k, v in state.best_parameters.items()}
    kept: dict[str, tuple[str, Any]] = {}
    for attribute, value in vars(strategy).items():
        kind, items, plain = _take_apart(value, f"{experiment.federation.strategy}.{attribute}")
        kept[attribute] = (kind, plain if kind == "plain" else list(items))
        arrays |= {f"strategy/{attribute}/{k}": v for k, v in items.items()}
    description = {
        "format": FORMAT,
        "experiment": _digest(record),
        "strategy": {attribute: pair for attribute, pair in kept.items() if pair[0] != "setting"},
        "order": list(state.parameters),
        **{k: v for k, v in vars(state).items() if k not in ("parameters", "best_parameters")},
    }
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    record.write(FILE, save(contiguous, {"fedveil": json.dumps(description)}))
    record.write("model.safetensors", _model(state.parameters))
    if state.best_parameters and state.best_round == state.round:
        record.write("best.safetensors", _model(state.best_parameters))


def _model(parameters: Parameters) -> bytes:
    return save({name: np.ascontiguousarray(value) for name, value in parameters.items()})


def _take_apart(value: Any, name: str) -> tuple[str, Parameters, Any]:
    """What a strategy keeps under one attribute: its kind, its arrays by name, and what is no array."""
    if isinstance(value, ArrayRecord):
        return "record", from_arrays(value), None
    if isinstance(value, np.ndarray):
        return "array", {"": value}, None
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        return "dict", {str(k): v for k, v in value.items()}, None
    if isinstance(value, list | tuple) and value and all(isinstance(v, np.ndarray) for v in value):
        return "list", {str(i): v for i, v in enumerate(value)}, None
    if callable(value):
        return "setting", {}, None  # the new strategy has it from its own making
    try:
        if json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value):
            return "plain", {}, value
    except (TypeError, ValueError):
        pass  # said below, for all that JSON does not keep
    raise SettingsError(
        f"federation.strategy: {name} is a {type(value).__name__}, which no checkpoint can hold; a strategy may keep "
        "arrays, dicts and lists of arrays, numbers, text, and lists and dicts of those"
    )


def _put_together(kind: str, items: Parameters, plain: Any) -> Any:
    """What `_take_apart` took apart."""
    if kind == "record":
        return to_arrays(items)
    if kind == "array":
        return items[""]
    if kind == "dict":
        return items
    return list(items.values()) if kind == "list" else plain


def load_state(record: Record) -> tuple[State, dict[str, Any]]:
    """The record's state, and what its strategy kept (for `restore`); raise SettingsError where they do not fit."""
    from safetensors import safe_open

    path = record.path(FILE)
    if not path.is_file():
        raise SettingsError(f"--resume {record.folder}: holds no {FILE}; no round was finished, start the run again")
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads(file.metadata()["fedveil"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"--resume {record.folder}: {FILE} is damaged ({error})") from None
    if description.pop("format") != FORMAT:
        raise SettingsError(f"--resume {record.folder}: {FILE} was written by another version of FedVeil")
    if description.pop("experiment") != _digest(record):
        raise SettingsError(
            f"--resume {record.folder}: experiment.toml is not the one that the checkpoint was made with; "
            "undo the edit, or start a new run"
        )
    stored: dict[str, tuple[str, Any]] = description.pop("strategy")
    order: list[str] = description.pop("order")
    kept: dict[str, Any] = {}
    for attribute, (kind, keys) in stored.items():
        items = {} if kind == "plain" else {key: arrays[f"strategy/{attribute}/{key}"] for key in keys}
        kept[attribute] = _put_together(kind, items, keys)
    state = State(
        parameters={k: arrays[f"model/{k}"] for k in order},
        best_parameters={k: arrays[f"best/{k}"] for k in order if f"best/{k}" in arrays},
        **description,
    )
    return state, kept


def restore(strategy: Strategy, kept: dict[str, Any]) -> None:
    """Give a new strategy what an earlier one kept between rounds."""
    for attribute, value in kept.items():
        setattr(strategy, attribute, value)


def _digest(record: Record) -> str:
    """Of the settings as the record holds them: later versions may know more settings, with other defaults."""
    return sha256(record.path("experiment.toml").read_bytes()).hexdigest()
