"""Steps of protection, and receiving: opening a model, and writing an update to be sent."""

from __future__ import annotations

import logging

import numpy as np
from flwr.app import ArrayRecord

from fedveil.client.learning.contribution import Contributions, Parameters
from fedveil.client.learning.homomorphic import Terms
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.client.learning.states import ClientStates, State, StateKey, to_state
from fedveil.core.errors import ForgeryError, ProtectionError
from fedveil.core.wire.messages import CLIENT, from_arrays, write_update
from fedveil.privacy.homomorphic.mac import settings_digest

RESIDUALS = StateKey("residuals")  # the accumulated loss of encoding a client's updates
NEWEST = StateKey("newest-aggregate", durable=False)
FORGED = StateKey("forged-aggregate", durable=False)  # why a client left the run for good
UNUSED = "this client does not use the model that it was sent; its own log says why"
log = logging.getLogger("flwr")  # where Flower shows what a node does


def receive(
    runtime: ClientRuntime, client: int, record: ArrayRecord, number: int, run: bytes, states: ClientStates
) -> Parameters:
    """Open the model of round `number` that a client was sent.

    Raise ProtectionError where the client must not use it, or its keys were made for other settings.
    """
    runtime.check_agreed(client)
    side = runtime.homomorphic(client)
    if side is None:
        return from_arrays(record)
    state = states.get(client, NEWEST)
    seen = None if state is None else (int(state["round"]), state["sha256"].tobytes())
    try:
        if states.get(client, FORGED) is not None:
            raise ProtectionError("the server sent an aggregate that it forged; this client left the run for good")
        given, newest = side.receive(record, run, number, seen)
    except ProtectionError as error:
        if isinstance(error, ForgeryError):
            states.put(client, FORGED, to_state(str(error).encode()))
        if runtime.states is not None or runtime.deployed:  # no other party is told the reason
            raise
        log.warning("refused: %s", error)
        raise ProtectionError(UNUSED) from None  # the same for every cause, so that refusals tell nothing
    states.put(client, NEWEST, {"round": np.array(newest[0]), "sha256": np.frombuffer(newest[1], np.uint8)})
    return given


def encrypts(runtime: ClientRuntime) -> bool:
    """Say whether updates are ciphertexts."""
    return runtime.experiment.privacy.shows == "sum"


def masks(runtime: ClientRuntime) -> bool:
    """Say whether updates are masked."""
    return runtime.experiment.privacy.shows == "mean"


def sends_clear(runtime: ClientRuntime) -> bool:
    """Say whether the server sees each update."""
    return not runtime.experiment.privacy.protected


def encrypt(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Encrypt each client's weights, weighted by its share of the announced examples, and authenticate them."""
    instructions, examples = contributions.instructions, contributions.counts()
    received = contributions.states[NEWEST.name]
    settings = settings_digest({key: value for key, value in instructions.settings.items() if key != CLIENT})
    for k, client in contributions.standing():
        try:
            side, newest = runtime.homomorphic(client), received[k]
            assert side is not None  # else the step is not active
            assert newest is not None  # kept by `receive`
            terms = Terms(
                instructions.round, instructions.run, instructions.reference, newest["sha256"].tobytes(), settings
            )
            contributions.updates[k] = side.seal(
                contributions.share(k, runtime.experiment, secret=runtime.secret_noise), client, int(examples[k]), terms
            )
        except ProtectionError as error:  # no reason to stop the others
            contributions.refusals[k] = error


def mask(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Mask the cohort's weights, so that only their sum can be read."""
    runtime.secagg.mask(contributions, secret=runtime.secret_noise)


def show(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Show a simulation's witness the weights that protection hides."""
    assert runtime.witness is not None  # else the step is not active
    for k, client in contributions.standing():
        weights, noise = contributions.share(k, runtime.experiment, secret=runtime.secret_noise)
        made = weights if noise is None else {name: value + noise[name] for name, value in weights.items()}
        runtime.witness.saw(client, made, int(contributions.counts()[k]))


def encode(runtime: ClientRuntime, contributions: Contributions) -> None:
    """Write each client's weights as `communication.encoding` says.

    The loss of int8 is added to the client's next update.
    """
    encoding, residuals = runtime.experiment.communication.encoding, contributions.states[RESIDUALS.name]
    for k, _client in contributions.standing():
        before: State | None = residuals[k]
        try:
            contributions.updates[k], lost = write_update(
                contributions.of(k), contributions.given, encoding, None if before is None else before["lost"]
            )
        except ProtectionError as error:  # no reason to stop the others
            contributions.refusals[k] = error
            continue
        residuals[k] = None if lost is None else {"lost": lost}
