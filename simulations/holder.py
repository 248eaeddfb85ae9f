"""The key holder of a simulation: a party apart from the server that decrypts, evaluates and writes the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from fedveil.client.learning.homomorphic import HomomorphicClient
from fedveil.client.learning.witness import Witness
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.foreign import reading
from fedveil.core.metrics import Scores
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record, write_atomically
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import SEALED
from fedveil.datasets.federated import load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic import first_format
from fedveil.privacy.homomorphic.first_format import format_of, open_first
from fedveil.privacy.homomorphic.keys import CLIENT, find_client_key, fingerprint, load_client, write_keys
from fedveil.privacy.homomorphic.wire import round_of, run_of
from fedveil.privacy.plan import make_lattice, plan_for
from fedveil.server.checkpoint import (
    BEST,
    LAYOUT,
    MODEL,
    SEALED_MODEL,
    Parameters,
    State,
    model_file,
    read_layout,
)
from fedveil.server.federation import Federation
from fedveil.server.serving.agreement import archived_digest
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
        self._write(MODEL, state.parameters, state)
        if state.best_round == state.round:
            self._write(BEST, state.parameters, state)

    def _write(self, name: str, parameters: Parameters, state: State) -> None:
        """Write a model that is a ciphertext to the server for its owner alone."""
        content = model_file(self.open(parameters), state.constants)
        self._record.write(name, content, flush=False, private=True)

    def put_back(self, state: State) -> None:
        """Write the checkpoint's models in the clear again, as a killed run may have written the checkpoint alone."""
        if SEALED in state.parameters:
            self._write(MODEL, state.parameters, state)
        if SEALED in state.best_parameters:
            self._write(BEST, state.best_parameters, state)

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


def open_record(folder: Path, keys: Path, out: Path | None, *, unauthenticated: bool = False) -> Path:
    """Decrypt a record's model.sealed with a client's key, and write it as safetensors, mode 0600; return the path.

    The record may be a server's, and the server may lie: nothing that it names is imported, no network is built of it,
    and the model must be a sum of what clients sent.
    folder: the record; keys: a client's folder of keys
    out: the file to write, model.safetensors in the record without it
    unauthenticated: open a model of FedVeil 0.1.0, which has no proof of that
    Raise SettingsError where the record has no encrypted model, ProtectionError where the keys do not open it.
    """
    experiment = _received(folder)
    sealed = folder / SEALED_MODEL
    if not sealed.is_file():
        raise SettingsError(f"{folder}: no round was done, so there is no encrypted model yet")
    blob = sealed.read_bytes()
    try:
        key = find_client_key(keys, 0)
    except ProtectionError:
        raise ProtectionError(
            f"{keys}: holds no {CLIENT}; only a client's folder of keys that was made for this run opens its model"
        ) from None
    first = format_of(blob) == first_format.FORMAT
    if first != unauthenticated:
        raise ProtectionError(
            f"{sealed}: was written by FedVeil 0.1.0, and nothing shows that it is a sum of what clients sent: a server "
            "that lies can make such a file to learn the key. To open it all the same: fedveil keys open --unauthenticated"
            if first
            else f"{sealed}: is authenticated; open it without --unauthenticated"
        )
    plan = plan_for(experiment)
    if first:
        layout, constants = _built(experiment, folder), Parameters()
        model = open_first(blob, load_client(key, old=True), plan, layout)
    else:
        layout, constants = read_layout(folder / LAYOUT)
        side = HomomorphicClient(plan, experiment.data.clients, layout, key, archived_digest(folder))
        model = side.open(blob, run_of(blob), round_of(blob))
    path = out or folder / MODEL
    write_atomically(path, model_file(model, constants), private=True)
    return path


def _built(experiment: Experiment, folder: Path) -> Layout:
    """Return the layout of FedVeil's own network on its own data, which a record of FedVeil 0.1.0 does not hold."""
    chosen = {
        "data.dataset": experiment.data.dataset,
        "data.partition": experiment.data.partition,
        "model": experiment.model,
    }
    for key, part in chosen.items():
        if part.is_own:
            raise SettingsError(
                f"{folder}: {key} = '{part.name}': the record names code, which is not run; open it with FedVeil 0.1.0, on a "
                "machine without secrets, where you trust who wrote the record"
            )
    task = load(experiment.data, experiment.seed).dataset.task
    return Layout.of(to_numpy(get(build(task, experiment.model, Stream(experiment.seed)))))


def _received(folder: Path) -> Experiment:
    """Return the settings of a record that is another party's; nothing that they name is imported."""
    path = folder / "experiment.toml"
    if not path.is_file():
        raise SettingsError(f"fedveil keys open {folder}: is not the folder of a run (it has no experiment.toml)")
    with reading(lambda why: SettingsError(f"{path}: cannot be read ({why})")):
        experiment = Experiment.received(path.read_text("utf-8"))
    protection = experiment.privacy.protection
    if protection.is_own or experiment.privacy.shows != "sum":
        raise SettingsError(
            f"{folder}: privacy.protection = '{protection}', whose model is no ciphertext; it is in {MODEL}"
        )
    return experiment
