"""The key holder of a simulation: a party apart from the server that decrypts, evaluates and writes the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from fedveil.client.learning.homomorphic import HomomorphicClient
from fedveil.client.learning.witness import Witness
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.metrics import Scores
from fedveil.core.record.record import Record, write_atomically
from fedveil.core.settings.experiment import resumable
from fedveil.core.wire.messages import SEALED
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import CLIENT, find_client_key, fingerprint, write_keys
from fedveil.privacy.homomorphic.wire import round_of
from fedveil.privacy.plan import make_lattice
from fedveil.server.checkpoint import BEST, MODEL, Parameters, State, load_state, model_file
from fedveil.server.federation import Federation, prepare
from fedveil.server.summary import describe_protection

KEYS = "keys"  # the folder of the keys in a record


class Holder:
    """The party that reads a run's encrypted models with the clients' key, and models in the clear as they are."""

    def __init__(
        self, federation: Federation, record: Record, side: HomomorphicClient | None, witness: Witness | None
    ) -> None:
        """`side`: decrypts; `witness`: has the clients' weights in the clear; each is None where there is none."""
        self._federation, self._record, self._side, self._witness = federation, record, side, witness

    def open(self, parameters: Parameters) -> Parameters:
        """Return the weights of a model, decrypted where it is a ciphertext."""
        if SEALED not in parameters:
            return parameters
        assert self._side is not None
        blob = parameters[SEALED].tobytes()
        return self._side.open(blob, bytes.fromhex(self._federation.state.run), round_of(blob))

    def evaluate(self, parameters: Parameters) -> Scores:
        """Return the scores of a model on the test data."""
        return self._federation.evaluate(self.open(parameters))

    def inspect(self, parameters: Parameters, clients: Sequence[int]) -> float:
        """Return the largest distance of a round's model from the plain mean of its clients' weights."""
        assert self._witness is not None
        return self._witness.error(self.open(parameters), clients)

    def write(self, state: State) -> None:
        """Write the models in the clear into the record, where the server keeps ciphertexts."""
        if SEALED not in state.parameters:
            return
        self._record.write(MODEL, model_file(self.open(state.parameters), state), flush=False)
        if state.best_round == state.round:
            self._record.write(BEST, (self._record.path(MODEL)).read_bytes(), flush=False)

    def put_back(self, state: State) -> None:
        """Write the checkpoint's models in the clear again, as a killed run may have written the checkpoint alone."""
        if SEALED in state.parameters:
            self._record.write(MODEL, model_file(self.open(state.parameters), state), flush=False)
        if SEALED in state.best_parameters:
            self._record.write(BEST, model_file(self.open(state.best_parameters), state), flush=False)

    def describe(self) -> None:
        """Write what protects this run, and who reads what, into the record."""
        experiment = self._federation.experiment
        readers = (
            "a key holder apart from the server evaluates the model, in the process of this simulation"
            if experiment.privacy.shows == "sum"
            else "the server evaluates the mean, which it sees"
        )
        key = fingerprint(self._side.key.key_id) if self._side is not None else None
        describe_protection(experiment, self._record, readers, key)


def make_keys_once(federation: Federation, record: Record) -> Path | None:
    """Return the folder of the run's keys, made with the run; None where its protection needs none.

    Raise ProtectionError where a resumed run has lost its keys, as new ones cannot open its model.
    """
    privacy, state = federation.experiment.privacy, federation.state
    if privacy.shows != "sum":
        return None
    folder = record.path(KEYS)
    if not folder.exists():
        if state.round or state.pending:
            raise ProtectionError(
                f"{folder}: the run's keys are gone, and its model is encrypted with them; put them back"
            )
        for unfinished in record.folder.glob(f".{KEYS}.*"):
            rmtree(unfinished)  # of a run that was killed while it wrote them
        write_keys(folder, make_lattice(privacy), 1)
    return folder


def open_record(folder: Path, keys: Path, out: Path | None) -> Path:
    """Decrypt a record's model.sealed with a client's key, and write it as safetensors; return the path.

    folder: the record; keys: a client's folder of keys
    out: the file to write, model.safetensors in the record without it
    Raise SettingsError where the record has no encrypted model, ProtectionError where the keys do not open it.
    """
    record = Record(folder)
    experiment = resumable(folder)
    if experiment.privacy.shows != "sum":
        raise SettingsError(
            f"{folder}: privacy.protection = '{experiment.privacy.protection}', whose model is no ciphertext; it is in {MODEL}"
        )
    state, _ = load_state(record)
    if SEALED not in state.parameters:
        raise SettingsError(f"{folder}: no round was done, so there is no encrypted model yet")
    try:
        key = find_client_key(keys, 0)
    except ProtectionError:
        raise ProtectionError(
            f"{keys}: holds no {CLIENT}; only a client's folder of keys that was made for this run opens its model"
        ) from None
    federation = prepare(experiment, record)
    side = HomomorphicClient(experiment, Layout.of(to_numpy(get(federation.network))), key)
    holder = Holder(federation, record, side, None)
    path = out or record.path(MODEL)
    write_atomically(path, model_file(holder.open(state.parameters), federation.state))
    return path
