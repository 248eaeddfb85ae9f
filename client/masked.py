"""A client's side of secure aggregation: the stages of `fedveil.privacy.masking` on Flower's messages.

What a client knows between stages lies in its Flower context, on its own machine: on a node every message may be a new
process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedveil.client.protect import Sealed, Witness, vector
from fedveil.core.errors import ProtectionError
from fedveil.core.experiment import Experiment
from fedveil.core.messages import ATTEMPT, BLOB, CLIENT, CONFIRMATIONS, REFERENCE, ROUND, RUN
from fedveil.privacy.graph import choose_degree
from fedveil.privacy.identity import Registry, Signer
from fedveil.privacy.masked import shown, to_ring, write_masked
from fedveil.privacy.masking import Masker, Revealed, mask_cohort
from fedveil.privacy.packing import Layout, quantize
from fedveil.privacy.parties import load_identity
from fedveil.privacy.plan import RESERVED, make_plan
from fedveil.privacy.rosters import Session

STAGES = ("advertise", "share", "confirm", "reveal")  # beside training
STATE, REVEALED = "fedveil.masker", "fedveil.revealed"  # in a client's state


@dataclass(frozen=True)
class MaskedSide:
    """What all clients of a process share; `witnesses` see what they make, in the clear."""

    experiment: Experiment
    layout: Layout
    witnesses: list[Witness]

    def session(self, config: Mapping[str, Any], active: bool) -> Session:
        """The session that a message is of: all but run, round and attempt from the client's own settings.

        A threshold that the server may choose protects from no server; it still chooses the cohort, whose size the threshold
        follows from, and privacy.protection.min_clients bounds. active: the server may lie
        """
        privacy, cohort = self.experiment.privacy, self.experiment.federation.cohort
        _, threshold = choose_degree(cohort, privacy.protection.drop_outs, privacy.protection.colluders, active)
        size = RESERVED + self.layout.size
        return Session(config[RUN], int(config[ROUND]), int(config[ATTEMPT]), size, threshold, privacy.least, active)

    def numbers(self, weights: Mapping[str, np.ndarray], examples: int, reference: int) -> tuple[np.ndarray, int]:
        """What is masked, uint32 [2 + size], and how many weights were clipped."""
        plan = make_plan(self.experiment.privacy, self.experiment.federation.cohort)
        values, clipped = quantize(vector(weights, self.layout), examples, reference, plan.grid, self.layout)
        return to_ring(values, examples), clipped


@lru_cache(maxsize=2)
def masked_side(experiment: Experiment, layout: Layout) -> MaskedSide:
    """The side of an experiment's clients, made once a process."""
    return MaskedSide(experiment, layout, [])


def answer(
    side: MaskedSide,
    stage: str,
    client: int,
    config: Mapping[str, Any],
    brought: Mapping[str, Any],
    state: RecordDict,
    keys: str,
) -> bytes:
    """What a client answers to a stage before or after its vector.

    brought: what the message carries for this client alone; state: of its Flower context; keys: its folder, or none
    Raise ProtectionError where it must not answer.
    """
    signer, registry = _identity(keys, client)
    if stage == "advertise":
        masker = Masker.begin(side.session(config, registry is not None), client, signer, registry)
        blob = masker.advertise()
    else:
        masker = load(side, client, config, state, keys)
        if stage == "share":
            blob = masker.share(brought[BLOB])
        elif stage == "confirm":
            blob = masker.confirm(brought[BLOB])
        elif stage == "reveal":
            memory = cast(ConfigRecord | None, state.get(REVEALED))
            revealed = Revealed() if memory is None else Revealed.load(cast(bytes, memory[BLOB]))
            blob = masker.reveal(brought[BLOB], revealed, brought[CONFIRMATIONS])
            state[REVEALED] = ConfigRecord({BLOB: revealed.save()})
            del state[f"{STATE}.{client}"]  # the session is over; its secrets go
            return blob
        else:
            raise ProtectionError(f"secure aggregation has no stage '{stage}'")
    _keep(state, masker)
    return blob


def load(side: MaskedSide, client: int, config: Mapping[str, Any], state: RecordDict, keys: str) -> Masker:
    """The client as it was after the last stage; raise ProtectionError where it has none in this session."""
    signer, registry = _identity(keys, client)
    kept = cast(ConfigRecord | None, state.get(f"{STATE}.{client}"))
    if kept is None:
        raise ProtectionError(f"client {client} has not begun a secure aggregation here; it may have been started anew")
    masker = Masker.load(cast(bytes, kept[BLOB]), signer, registry)
    if masker.session != side.session(config, registry is not None):
        raise ProtectionError(
            f"client {client} is in round {masker.session.round}, attempt {masker.session.attempt} of secure aggregation, and the "
            f"message is of round {config[ROUND]}, attempt {config[ATTEMPT]}, or of other settings"
        )
    return masker


def seal_cohort(
    side: MaskedSide,
    members: Sequence[tuple[int, Mapping[str, np.ndarray], int, Mapping[str, Any], RecordDict]],
    config: Mapping[str, Any],
    given: Mapping[str, np.ndarray],
    keys: str,
) -> list[Sealed | ProtectionError]:
    """Masked updates of many clients of one process; each pair's mask is made once.

    members: of each its number, weights, examples, what the message brought for it alone, and the state of its context
    config, given: settings of the round and the model that all of them trained
    Gives for each its update, or why it cannot be protected.
    """
    started = time.process_time()
    found: list[Sealed | ProtectionError | None] = [None] * len(members)
    able: list[tuple[int, Masker, np.ndarray, int]] = []
    for i, (client, weights, examples, brought, state) in enumerate(members):
        try:
            for witness in side.witnesses:
                witness.saw(client, weights, examples)
            masker = load(side, client, config, state, keys)
            masker.receive(brought[BLOB])
            numbers, clipped = side.numbers(weights, examples, int(config[REFERENCE]))
            able.append((i, masker, numbers, clipped))
        except ProtectionError as error:
            found[i] = error
    rows = np.stack([numbers for _, _, numbers, _ in able]) if able else np.zeros((0, 0), np.uint32)
    settings = {key: value for key, value in config.items() if key != CLIENT}
    mask_cohort([masker for _, masker, _, _ in able], rows, shown(given, side.layout, settings))
    seconds = (time.process_time() - started) / max(len(able), 1)
    for (i, masker, _, clipped), row in zip(able, rows, strict=True):
        _keep(members[i][4], masker)
        found[i] = Sealed(write_masked(masker.session, masker.client, row), clipped, seconds)
    return cast("list[Sealed | ProtectionError]", found)


def _keep(state: RecordDict, masker: Masker) -> None:
    state[f"{STATE}.{masker.client}"] = ConfigRecord({BLOB: masker.save()})


def _identity(keys: str, client: int) -> tuple[Signer | None, Registry | None]:
    """A client's registered key and everybody's public ones; none where the server is trusted to follow the protocol."""
    return load_identity(Path(keys), client) if keys else (None, None)
