"""The checkpoint of a run: one file, replaced as a whole after every round.

The file is safetensors: the model, the best model, the arrays of a strategy's state (momenta, second moments), the
index of the clients' states in their store, and the newest rows of the tables, with a JSON description and a CRC-32 of
it all. Random streams need no saving: they are addressed by round (`core/randomness.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from safetensors import safe_open
from safetensors.numpy import load, save

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import reading
from fedveil.core.record.record import TABLES, Record, Table, newest, write_in_turn
from fedveil.core.record.resumes import earlier_settings
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import SEALED, from_arrays, to_arrays
from fedveil.privacy.fixed_point import Layout
from fedveil.server.rounds.strategy import Strategy

FILE = "checkpoint/state.safetensors"
FORMAT = 5
MODEL, BEST = "model.safetensors", "best.safetensors"
SEALED_MODEL, SEALED_BEST = "model.sealed", "best.sealed"  # encrypted models
LAYOUT = "layout.safetensors"  # the names and shapes of the weights in them, and the network's constants
STORED_APART = (
    "constants",
    "parameters",
    "best_parameters",
    "pending",
    "train_losses",
    "asked",
    "clients",
    "client_index",
)
Parameters = dict[str, np.ndarray]
# the types of numbers that a strategy may keep: NumPy's names, and safetensors'
KINDS = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<u2": "U16", "<i2": "I16", "<u4": "U32", "<i4": "I32", "<u8": "U64",
    "<i8": "I64", "<f2": "F16", "<f4": "F32", "<f8": "F64",
}  # fmt: skip
RECORDS: dict[str, Any] = {"ArrayRecord": to_arrays, "MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord}


class ClientStore(Protocol):
    """The states that clients of a simulation keep, on disk beside the checkpoint."""

    def commit(self) -> dict[str, np.ndarray]:
        """Write the states to disk, and return the index that finds them again."""


@dataclass
class State:
    """Everything that a round takes from the rounds before it.

    round: the last complete round; 0 before the first
    parameters: the global model, float32, by name
    train_losses: of every round so far, for the learning rate's schedule
    best_round, best_accuracy, best_loss, best_parameters: the best evaluation so far
    stale: evaluations since the accuracy last rose
    stopped: why the run ended before its last round, in words; empty where it did not
    data: digest of a user's own data, which may change between a run and its resumption; empty for others
    bytes_up, bytes_down: of all messages so far; seconds: of all rounds so far
    run: 16 bytes that name a protected run, in hexadecimal digits
    costs: of the protection so far: seal_seconds, open_seconds, clipped, largest_error, error_bound
    pending, pending_rows: a protected model that is made but not evaluated yet, and the account of its round
    clients: of a simulation, the store of its clients' states
    client_index: the index of an earlier process' store, as the checkpoint had it
    asked: of a run with noise, how often each client was asked for an update
    fewest: of a run with noise, the clients in the smallest sum; 0 before the first round
    population, drawn: of a run with noise, the fewest clients that a cohort was drawn from, and the largest cohort; 0
    before the first round
    cohorts: of a run with noise, how many cohorts were asked; one that was cut off, and the one asked in its place, are two
    clip: the bound of updates in the next round, where it changes from round to round; 0 where it does not
    turns: the seed of the clients' turns, where it is not the experiment's; 0 where it is
    made: the round that made the model: the last complete one, but for rounds that were left out
    mechanism: of the run's noise, as `fedveil list mechanisms` names it; empty without noise
    numbers: in the model, which may be a ciphertext
    smallest: of a run whose noise hides examples, how many the client has whose are used most; 0 where nobody knows
    constants: buffers of the network, which stand in the file of a model beside its weights; they are no message's
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
    run: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    pending: Parameters = field(default_factory=dict)
    pending_rows: dict[str, Any] = field(default_factory=dict)
    clients: ClientStore | None = None
    client_index: Parameters = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    fewest: int = 0
    population: int = 0
    drawn: int = 0
    cohorts: int = 0
    clip: float = 0.0
    turns: int = 0
    made: int = 0
    mechanism: str = ""
    smallest: int = 0
    numbers: int = 0
    constants: Parameters = field(default_factory=dict)
    best_loss: float = math.inf


def save_state(record: Record, experiment: Experiment, state: State, strategy: Strategy) -> None:
    """Replace the record's checkpoint by this state, atomically, and then the models beside it.

    Raise SettingsError, naming the attribute, where a user's own strategy keeps what cannot be stored.
    """
    arrays = {f"model/{k}": v for k, v in state.parameters.items()}
    arrays |= {f"best/{k}": v for k, v in state.best_parameters.items()}
    arrays |= {f"pending/{k}": v for k, v in state.pending.items()}
    if state.clients is not None:
        arrays |= {f"clients/{name}": value for name, value in state.clients.commit().items()}
    arrays["train_losses"] = np.array(state.train_losses, np.float64)
    if state.asked:
        arrays["asked"] = np.array(sorted(state.asked.items()), np.int64)
    kept: dict[str, Any] = {}
    for attribute, value in strategy.kept().items():
        kept[attribute], own = _take_apart(value, f"{experiment.federation.strategy}.{attribute}")
        arrays |= {f"strategy/{attribute}/{k}": v for k, v in own.items()}
    record.settle()
    arrays |= {f"rows/{name}": np.frombuffer(table.rows, np.uint8) for name, table in record.tables.items()}
    description = {
        "experiment": record.settings,
        "strategy": kept,
        "order": list(state.parameters),
        "tables": {name: (table.length, table.crc) for name, table in record.tables.items()},
        **{k: v for k, v in vars(state).items() if k not in STORED_APART},
    }
    write_in_turn(record.path(FILE), *_pack(arrays, {"format": str(FORMAT), "fedveil": json.dumps(description)}))
    _write_models(record, state, best=state.best_round == state.round)


def put_back(record: Record, state: State) -> None:
    """Restore the files beside the checkpoint to its round: a killed run may have written some of the next."""
    record.cut()
    _write_models(record, state, best=True)


def _write_models(record: Record, state: State, *, best: bool) -> None:
    """Write model.safetensors and, where asked, best.safetensors.

    They are not flushed, because the checkpoint holds them too. An encrypted model goes to files of its own, as it is.
    """
    if state.run and state.round == 0:
        return  # in a protected run everybody makes the first model from the seed
    if SEALED in state.parameters:
        record.write(SEALED_MODEL, state.parameters[SEALED].data, flush=False)
        if best and SEALED in state.best_parameters:
            record.write(SEALED_BEST, state.best_parameters[SEALED].data, flush=False)
        return
    content = model_file(state.parameters, state.constants)
    record.write(MODEL, content, flush=False)
    if best and state.best_parameters:
        same = state.best_parameters is state.parameters
        record.write(BEST, content if same else model_file(state.best_parameters, state.constants), flush=False)


def model_file(parameters: Parameters, constants: Parameters) -> bytes:
    """Return weights, with the network's constants, as a safetensors file."""
    return save({name: np.asarray(value, order="C") for name, value in (parameters | constants).items()})


def write_layout(record: Record, layout: Layout, constants: Parameters) -> None:
    """Write what opening an encrypted model needs of the network, so that nobody has to build it for that."""
    about = {"layout": json.dumps(layout.shapes)}
    record.write(LAYOUT, save({name: np.asarray(value, order="C") for name, value in constants.items()}, about))


def read_layout(path: Path) -> tuple[Layout, Parameters]:
    """Return the layout of an encrypted model, and the network's constants; raise SettingsError where it is damaged."""
    with reading(lambda why: SettingsError(f"{path}: cannot be read ({why}); copy the whole record from the server")):
        with safe_open(path, "numpy") as file:
            shapes = json.loads(file.metadata()["layout"])
            constants = {name: file.get_tensor(name) for name in list(file.keys())}
        layout = Layout(tuple((str(name), tuple(int(side) for side in shape)) for name, shape in shapes))
        return layout, constants


def _pack(arrays: Parameters, about: dict[str, str]) -> list[bytes | memoryview]:
    """Return a safetensors file in pieces, with a CRC-32 of the header without it, and of the arrays.

    `safetensors.numpy.save` makes the same file in five times the time.
    """
    contiguous = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    header: dict[str, Any] = {"__metadata__": about}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name, value in sorted(contiguous.items(), key=lambda item: -item[1].itemsize):  # so that each is aligned
        start, end = end, end + value.nbytes
        header[name] = {"dtype": KINDS[value.dtype.str], "shape": value.shape, "data_offsets": (start, end)}
        pieces.append(value.reshape(-1).view(np.uint8).data)
    about["crc32"] = str(_crc(header, pieces))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def _crc(header: dict[str, Any], pieces: Iterable[bytes | memoryview]) -> int:
    found = crc32(json.dumps(header).encode())
    for piece in pieces:
        found = crc32(piece, found)
    return found


def _unpack(content: bytes) -> tuple[dict[str, str], Parameters]:
    """Return what `_pack` packed, without arrays where the format is another.

    Raise ValueError and others where the file is damaged.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    about: dict[str, str] = header["__metadata__"]
    if about["format"] != str(FORMAT):
        return about, {}
    if about.pop("crc32") != str(_crc(header, [memoryview(content)[start:]])):
        raise ValueError("its checksum is not the one it was written with")
    return about, load(content)


def _take_apart(value: Any, name: str) -> tuple[Any, Parameters]:
    """Return a strategy's value as JSON can hold it, and its arrays; raise SettingsError where it cannot be stored."""
    arrays: Parameters = {}
    try:
        return _branch(value, arrays), arrays
    except TypeError:
        raise SettingsError(
            f"federation.strategy: {name} is a {type(value).__name__}, which no checkpoint can hold; a strategy may keep "
            "arrays, numbers, text, Flower's records, and lists, tuples and dicts of those; what is of another type must stay "
            "as it was when the strategy was made"
        ) from None


def _branch(value: Any, arrays: Parameters) -> Any:
    """Return a value as JSON can hold it, and put its arrays into `arrays`; raise TypeError where it cannot be held."""
    if _is_array(value):
        arrays[str(len(arrays))] = value
        return {"array": str(len(arrays) - 1)}
    kind = type(value)  # a subclass would come back as what it is made of
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": _branch(from_arrays(value), arrays)}
    if kind in (MetricRecord, ConfigRecord):
        return {kind.__name__: _branch(dict(value), arrays)}
    if kind in (list, tuple):
        return {kind.__name__: [_branch(one, arrays) for one in value]}
    if kind is dict:
        return {"dict": [[_branch(key, arrays), _branch(one, arrays)] for key, one in value.items()]}
    raise TypeError


def _put_together(branch: Any, arrays: Parameters) -> Any:
    """Return the value that `_take_apart` took apart."""
    if not isinstance(branch, dict):
        return branch
    ((kind, inner),) = branch.items()
    if kind == "array":
        return arrays[inner]
    if kind == "dict":
        return {_put_together(key, arrays): _put_together(value, arrays) for key, value in inner}
    if kind in RECORDS:
        return RECORDS[kind](_put_together(inner, arrays))
    made = [_put_together(value, arrays) for value in inner]
    return tuple(made) if kind == "tuple" else made


def can_store(value: Any) -> bool:
    """Say whether a checkpoint can hold a strategy's value."""
    try:
        _take_apart(value, "")
    except SettingsError:
        return False
    return True


def check_storable(strategy: Strategy, name: str) -> None:
    """Raise SettingsError, naming the attribute, where a strategy keeps what no checkpoint can hold."""
    for attribute, value in strategy.kept().items():
        _take_apart(value, f"{name}.{attribute}")


def _in_order(found: Parameters, order: Sequence[str]) -> Parameters:
    """Return a model's weights in the network's order, which a file does not keep; a ciphertext as it is."""
    return {name: found[name] for name in order} if set(found) == set(order) else found


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.str in KINDS


def begun(record: Record) -> bool:
    """Say whether a run has a checkpoint to resume from.

    A run that was killed at its very start has none, and starts again. Raise SettingsError where the checkpoint was
    lost.
    """
    if newest(record.path(FILE)).exists():
        return True
    if any(record.path(name).exists() for name in TABLES):
        raise SettingsError(
            f"fedveil resume {record.folder}: {FILE} is missing, and rounds were done; put it back, or start a new run"
        )
    return False


def load_state(record: Record) -> tuple[State, dict[str, Any]]:
    """Return the record's state, and what its strategy kept, and set the record's tables.

    Raise SettingsError where the checkpoint is damaged, or does not fit the rest of the record.
    """
    damaged = f"fedveil resume {record.folder}: {FILE} is damaged"
    with reading(lambda why: SettingsError(f"{damaged} ({why}); put it back, or start a new run")):
        return _read(record)


def _read(record: Record) -> tuple[State, dict[str, Any]]:
    about, arrays = _unpack(newest(record.path(FILE)).read_bytes())
    version, description = about["format"], json.loads(about["fedveil"])
    if version != str(FORMAT):
        raise SettingsError(
            f"fedveil resume {record.folder}: {FILE} was written by another version of FedVeil "
            f"(format {version}; this version reads {FORMAT}); go on with that version, or start a new run"
        )
    if description.pop("experiment") not in earlier_settings(record):
        raise SettingsError(
            f"fedveil resume {record.folder}: experiment.toml is not the one that the checkpoint was made with: it was edited, or "
            "one of them is another run's; put it back, or start a new run"
        )
    stored: dict[str, Any] = description.pop("strategy")
    order: list[str] = description.pop("order")
    kept: dict[str, Any] = {}
    for attribute, branch in stored.items():
        before = f"strategy/{attribute}/"
        own = {key.removeprefix(before): value for key, value in arrays.items() if key.startswith(before)}
        kept[attribute] = _put_together(branch, own)
    record.tables = {
        name: Table(length, crc, arrays[f"rows/{name}"].tobytes())
        for name, (length, crc) in description.pop("tables").items()
    }
    record.check()
    state = State(
        parameters={k: arrays[f"model/{k}"] for k in order},
        best_parameters={k: arrays[f"best/{k}"] for k in order if f"best/{k}" in arrays},
        pending=_in_order(
            {k.removeprefix("pending/"): v for k, v in arrays.items() if k.startswith("pending/")}, order
        ),
        train_losses=arrays["train_losses"].tolist(),
        client_index={k.removeprefix("clients/"): v for k, v in arrays.items() if k.startswith("clients/")},
        asked=dict(arrays["asked"].tolist()) if "asked" in arrays else {},
        **description,
    )
    return state, kept
